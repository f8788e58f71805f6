"""Rotary embeddings that compute the two parts of each pair apart, and what only looks like them."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.passes.recognize.rope_examples import Function, example


def parts(x: Tensor, read: str) -> tuple[Tensor, ...]:
    """First and second entry of each pair: "halves", "steps" or "picks"."""
    if read == "halves":
        return x.chunk(2, dim=-1)
    return (x[..., ::2], x[..., 1::2]) if read == "steps" else x.reshape(*x.shape[:-1], -1, 2).unbind(-1)


def rotated(read: str, write: str) -> Function:
    """Reads pairs one way and writes them one way."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = parts(x, read)
        out = first * cos - second * sin, second * cos + first * sin
        return torch.cat(out, -1) if write == "halves" else torch.stack(out, -1).flatten(-2)

    return rotate


def negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The difference is written as a sum."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + -second * sin, first * sin + second * cos), -1)


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The roles of the halves are exchanged."""
    second, first = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turned the other way (NanoChat)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, first * (-sin) + second * cos), -1)


def no_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both outputs subtract."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos - first * sin), -1)


def front(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Only the first four entries turn."""
    turned = rotated("halves", "halves")(x[..., :4], cos, sin)
    return torch.cat((turned, x[..., 4:]), -1)


EXAMPLES = (
    example("halves", rotated("halves", "halves"), table=4),
    example("steps", rotated("steps", "pairs"), table=4),
    example("picks", rotated("picks", "pairs"), table=4),
    example("steps to halves", rotated("steps", "halves"), table=4),
    example("front", front, table=2),
    example("sum of a negative", negated, table=4),
    example("the other way", other_way, table=4),
)

NEAR_MISSES = (
    example("exchanged halves", backwards, "the parts are not the two halves", table=4),
    example("both subtract", no_turn, "expected aten.add.Tensor", table=4),
    example("halves to pairs", rotated("halves", "pairs"), "reads halves and writes pairs", table=4),
    example("one value a row", rotated("halves", "halves"), "do not have one value for each pair", table=1),
)
