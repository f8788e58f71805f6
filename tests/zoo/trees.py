"""Verifying a tree of drafts in one pass (PPD, arXiv:2405.18628; Falcon, arXiv:2412.12639): what came before, then the
ancestors of each node."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, SIZE, WIDTH, Projections, attend, join

#: Parent of each node, -1 for the root: three candidates, prompt tokens behind the first two, as PPD lays them out.
PPD = (-1, 0, 0, 0, 1, 1, 2, 4, 6)
#: Falcon's drafter emits two tokens at once; a path may be there twice.
FALCON = (-1, 0, 1, 0, 3, 1, 5, 1, 5)


def ancestors(parents: tuple[int, ...]) -> Tensor:
    """``[nodes, nodes]``: itself and those above; the root is seen by all."""
    seen = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        seen[node] = seen[parent] if parent >= 0 else False
        seen[node, node] = True
    return seen


class TreeVerification(Projections):
    """The nodes' tokens attend to a cache ``[batch, heads, before, size]`` and to their ancestors."""

    def __init__(self, parents: tuple[int, ...], width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.register_buffer("tree", ancestors(parents))
        depth = torch.tensor([int(row.sum()) - 1 for row in ancestors(parents)])
        self.register_buffer("depth", depth)
        self.place = nn.Embedding(8192, width // heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query, key, value = self.split(x)
        before = keys.shape[2]
        places = self.place(before + self.depth)
        query, key = query + places, key + places
        seen = torch.cat([torch.ones(x.shape[1], before, dtype=torch.bool), self.tree], -1)
        out = attend(query, torch.cat([keys, key], 2), torch.cat([values, value], 2), seen)
        return self.out(join(out))


def cache(batch: int, before: int, heads: int = HEADS, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Random cached keys and values."""
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(batch, heads, before, size, generator=generator) for _ in range(2))
    return keys, values
