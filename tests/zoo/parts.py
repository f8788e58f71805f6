"""What several systems are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH, HEADS, SIZE = 32, 4, 8


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """``[batch, length, heads * size]`` as ``[batch, heads, length, size]``."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """The inverse of ``split``."""
    batch, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * size)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(size)) v over the keys that are seen."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ value


def causal(length: int) -> Tensor:
    """Which keys ``[length, length]`` a row sees: its own and those before."""
    place = torch.arange(length)
    return place <= place[:, None]


class Projections(nn.Module):
    """Query, key, value and output of an attention."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by heads."""
        query, key, value = (split(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        return query, key, value
