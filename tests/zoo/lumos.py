"""Lumos-1 (arXiv:2507.08801): rotary places of time, height and width in each block of 16 dims, and frames that see
themselves whole and all before."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo.parts import Projections, attend, causal, join

#: Axis of each dim of a block of 16: two parts time, three height, three width.
AXES = (0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2)


class Lumos(Projections):
    """A text of ``text`` tokens, then frames of ``height * width`` each."""

    def __init__(self, size: int, heads: int = 2, text: int = 5, height: int = 2, width: int = 3) -> None:
        super().__init__(size * heads, heads)
        self.size, self.text, self.height, self.wide = size, text, height, width

    def places(self, length: int) -> Tensor:
        """Time, height and width of each token, ``[3, length]``; text has its number on all three."""
        index = torch.arange(length)
        inside, area = index - self.text, self.height * self.wide
        axes = torch.stack([inside // area, inside % area // self.wide, inside % self.wide])
        return torch.where(index < self.text, index, axes + self.text)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[length, size]`` for halves that rotate together."""
        half = self.size // 2
        rate = 1e4 ** (-torch.arange(half) / half)
        axis = torch.tensor([AXES[dim % 16] for dim in range(self.size)])
        angle = self.places(length)[axis].mT * torch.cat([rate, rate])
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x cos + (-second half, first half) sin."""
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        cos, sin = (table.to(x.dtype) for table in self.tables(x.shape[1]))
        index = torch.arange(x.shape[1])
        frame = (index - self.text) // (self.height * self.wide)
        together = (frame[:, None] == frame) & (index[:, None] >= self.text) & (index >= self.text)
        seen = causal(x.shape[1]) | together
        return self.out(join(attend(self.rotate(query, cos, sin), self.rotate(key, cos, sin), value, seen)))
