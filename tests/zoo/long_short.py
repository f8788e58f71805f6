"""Long-short attention (arXiv:2505.15548): some heads see a window, the others all keys before."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo.parts import HEADS, Projections, attend, causal, join

SHORT, WINDOW = HEADS // 2, 5


class LongShortByMask(Projections):
    """One attention whose mask differs from head to head."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        place = torch.arange(x.shape[1])
        near = place[:, None] - place < WINDOW
        long = torch.arange(HEADS)[:, None, None] >= SHORT
        return self.out(join(attend(query, key, value, causal(x.shape[1]) & (long | near))))


class LongShortByHeads(Projections):
    """Two attentions on slices of the heads."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        place = torch.arange(x.shape[1])
        near = causal(x.shape[1]) & (place[:, None] - place < WINDOW)
        short = attend(query[:, :SHORT], key[:, :SHORT], value[:, :SHORT], near)
        long = attend(query[:, SHORT:], key[:, SHORT:], value[:, SHORT:], causal(x.shape[1]))
        return self.out(join(torch.cat([short, long], 1)))
