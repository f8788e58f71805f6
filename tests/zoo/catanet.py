"""CATANet (arXiv:2503.06896): tokens sorted by nearest centre, attention in windows of the order and to centres."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join, split

CENTRES, GROUP = 4, 6


class Grouping(nn.Module):
    """Centres are constants; the order is stable, so that a token's window does not depend on the machine."""

    centres: Tensor

    def __init__(self, width: int = WIDTH, heads: int = HEADS, centres: int = CENTRES, group: int = GROUP) -> None:
        super().__init__()
        self.heads, self.group = heads, group
        self.register_buffer("centres", torch.randn(centres, width))
        self.own = Projections(width, heads)
        self.centre_key, self.centre_value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        likeness = F.normalize(x, dim=-1) @ F.normalize(self.centres, dim=-1).mT
        order = likeness.argmax(-1).argsort(dim=-1, stable=True)
        index = order[..., None].expand(-1, -1, width)
        query, key, value = (layer(x).gather(1, index) for layer in (self.own.query, self.own.key, self.own.value))
        windows = self.grouped(query), self.wide(key), self.wide(value)
        inside = attend(*(part.reshape(-1, *part.shape[2:]) for part in windows))
        inside = join(inside).reshape(batch, length, width)
        keys, values = (split(layer(self.centres)[None], self.heads) for layer in (self.centre_key, self.centre_value))
        across = join(
            attend(split(query, self.heads), keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))
        )
        back = order.argsort(dim=-1)[..., None].expand(-1, -1, width)
        return self.own.out((inside + across).gather(1, back))

    def grouped(self, x: Tensor) -> Tensor:
        """``[batch, groups, heads, group, size]``."""
        batch, length, _ = x.shape
        return x.reshape(batch, length // self.group, self.group, self.heads, -1).transpose(2, 3)

    def wide(self, x: Tensor) -> Tensor:
        """Each group with the one behind it, the last with itself turned round."""
        grouped = self.grouped(x)
        behind = torch.cat((grouped[:, 1:], grouped[:, -1:].flip(3)), dim=1)
        return torch.cat((grouped, behind), dim=3)
