"""Hi-MAR's step (ICML 2025) and a visual autoregressive one: coarse tokens first, then all of them beside these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join


class CoarseToFine(nn.Module):
    """Known tokens take the place of a mask token; coarse ones see themselves, fine ones all that is there."""

    def __init__(self, coarse: int, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.coarse = coarse
        self.unknown = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(Projections(width, heads) for _ in range(2))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        x = torch.where(known[..., None], x, self.unknown)
        place = torch.arange(x.shape[1])
        seen = (place < self.coarse) | (place[:, None] >= self.coarse)
        for layer in self.layers:
            x = x + layer.out(join(attend(*layer.split(x), seen)))
        return x
