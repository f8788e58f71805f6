"""Super tokens (SViT, arXiv:2211.11167): pixels are soft members of the nine nearest cells, which attend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join

CELL, SIDE = 2, 4  # pixels along a cell, cells along the map


class SuperTokens(nn.Module):
    """One iteration of membership, attention among the cells, and back to the pixels."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, side: int = SIDE, cell: int = CELL) -> None:
        super().__init__()
        self.width, self.side, self.cell = width, side, cell
        self.attention = Projections(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, side, cell = x.shape[0], self.width, self.side, self.cell
        cells = F.adaptive_avg_pool2d(x, (side, side))
        pixels = x.reshape(batch, width, side, cell, side, cell).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(batch, side * side, cell * cell, width)
        member = (pixels @ self.around(cells) * width**-0.5).softmax(-1)
        total = self.gather(member.sum(2)[:, None])
        cells = self.gather((pixels.mT @ member).transpose(1, 2)) / (total + 1e-12)
        tokens = cells.flatten(2).mT
        tokens = self.attention.out(join(attend(*self.attention.split(tokens))))
        cells = tokens.mT.reshape(batch, width, side, side)
        found = self.around(cells) @ member.mT
        found = found.reshape(batch, side, side, width, cell, cell).permute(0, 3, 1, 4, 2, 5)
        return found.reshape(batch, width, side * cell, side * cell)

    def around(self, cells: Tensor) -> Tensor:
        """The nine cells around each, ``[batch, cells, width, 9]``; zeros beyond the edge."""
        near = F.unfold(cells, 3, padding=1).reshape(cells.shape[0], self.width, 9, -1)
        return near.permute(0, 3, 1, 2)

    def gather(self, parts: Tensor) -> Tensor:
        """The inverse: what cells ``[batch, width, cells, 9]`` give to those around them, added up."""
        batch, width = parts.shape[:2]
        columns = parts.transpose(2, 3).reshape(batch, width * 9, self.side**2)
        return F.fold(columns, (self.side, self.side), 3, padding=1)
