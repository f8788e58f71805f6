"""Core context aware attention (arXiv:2412.12465): groups of keys pooled by their last query, and a window of keys.

The pooled keys and values are those after the projections, which is what makes one softmax over both sets exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join

GROUP, WINDOW = 4, 8


class CoreContextAttention(Projections):
    """Cores of groups that ended before the window, then the window, in one softmax."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, group: int = GROUP, window: int = WINDOW) -> None:
        super().__init__(width, heads)
        self.group, self.window = group, window

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        batch, heads, length, size = query.shape
        count = length // self.group
        grouped = [t.reshape(batch, heads, count, self.group, size) for t in (query, key, value)]
        last = grouped[0][:, :, :, -1:]
        weights = (last @ grouped[1].mT / math.sqrt(size)).softmax(-1)
        core_key, core_value = ((weights @ t)[:, :, :, 0] for t in grouped[1:])
        place = torch.arange(length)
        low = (place - self.window + 1).clamp(min=0) // self.group * self.group
        end = torch.arange(count) * self.group + self.group - 1
        seen = torch.cat([end < low[:, None], (place >= low[:, None]) & (place <= place[:, None])], -1)
        out = attend(query, torch.cat([core_key, key], 2), torch.cat([core_value, value], 2), seen)
        return self.out(join(out))
