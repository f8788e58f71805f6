"""Long-short attention (arXiv:2505.15548): some heads see a window, the others all keys before."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, causal, join

WINDOW = 5


class _LongShort(Projections):
    """The first half of the heads sees ``window`` keys."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, window: int = WINDOW) -> None:
        super().__init__(width, heads)
        self.short, self.window = heads // 2, window


class LongShortByMask(_LongShort):
    """One attention whose mask differs from head to head."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        place = torch.arange(x.shape[1])
        near = place[:, None] - place < self.window
        long = torch.arange(self.heads)[:, None, None] >= self.short
        return self.out(join(attend(query, key, value, causal(x.shape[1]) & (long | near))))


class LongShortByHeads(_LongShort):
    """Two attentions on slices of the heads."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        place = torch.arange(x.shape[1])
        near = causal(x.shape[1]) & (place[:, None] - place < self.window)
        end = self.short
        short = attend(query[:, :end], key[:, :end], value[:, :end], near)
        long = attend(query[:, end:], key[:, end:], value[:, end:], causal(x.shape[1]))
        return self.out(join(torch.cat([short, long], 1)))
