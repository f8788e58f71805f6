"""Rotary embeddings as models write them, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[..., Any]


def example(
    name: str, function: Function, reason: str = "", *, table: int = 8, dtype: torch.dtype = torch.float32
) -> Example:
    """A function of ``x [2, 3, 5, 8]`` (batch, heads, length, head_dim), ``cos`` and ``sin`` of angles."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 5, 8, generator=generator).to(dtype)
        angles = torch.rand(5, table, generator=generator)
        return function, (x, angles.cos(), angles.sin())

    return Example(name, make, reason)


def half(x: Tensor) -> Tensor:
    """Entry ``i`` pairs with ``i + size / 2`` (Llama)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def by_step(x: Tensor) -> Tensor:
    """Neighbours are pairs (GPT-J, Cohere)."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def by_reshape(x: Tensor) -> Tensor:
    """Neighbours are pairs, read from a split dimension."""
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((-second, first), dim=-1).reshape(x.shape)


def rotated(turn: Callable[[Tensor], Tensor]) -> Function:
    """The rotation by a turned copy."""
    return lambda x, cos, sin: x * cos + turn(x) * sin


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Only the first four entries turn (GPT-NeoX, Phi)."""
    front, rest = x[..., :4], x[..., 4:]
    return torch.cat((front * cos + half(front) * sin, rest), dim=-1)


def last_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last four entries turn."""
    front, rest = x[..., :4], x[..., 4:]
    return torch.cat((front, rest * cos + half(rest) * sin), dim=-1)


def part_by_step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first four entries turn, as neighbours (GPT-J)."""
    front, rest = x[..., :4], x[..., 4:]
    return torch.cat((front * cos + by_step(front) * sin, rest), dim=-1)


def packed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs are read from the tensor before its heads were split off."""
    heads = (x + 1).reshape(2, 15, 8).reshape(2, 3, 5, 8)
    return heads * cos + by_reshape(heads) * sin


def deepseek(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs are read as neighbours and written as halves."""
    x = x.view(2, 3, 5, 4, 2).transpose(4, 3).reshape(2, 3, 5, 8)
    return x * cos + half(x) * sin


def cast_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both factors are widened, each on its own (ERNIE)."""
    return (x.float() * cos + half(x).float() * sin).to(x.dtype)


def swapped(x: Tensor) -> Tensor:
    """The half that is negated is the wrong one."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def other_way(x: Tensor) -> Tensor:
    """Turned the other way (NanoChat)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def uneven(x: Tensor) -> Tensor:
    """The parts have different sizes."""
    return torch.cat((-x[..., 3:], x[..., :3]), dim=-1)


def swapped_pairs(x: Tensor) -> Tensor:
    """The entry of each pair that is negated is the wrong one."""
    return torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2)


EXAMPLES = (
    example("half", rotated(half)),
    example("tables first", lambda x, cos, sin: sin * half(x) + cos * x),
    example("tables unsqueezed", lambda x, cos, sin: x * cos[None, None] + half(x) * sin[None, None]),
    example("the other way", rotated(other_way)),
    example("by step", rotated(by_step)),
    example("turned back", lambda x, cos, sin: x * cos - half(x) * sin),
    example("times a decay", lambda x, cos, sin: x * cos * (cos + 2) + half(x) * sin * (cos + 2)),
    example("by reshape", rotated(by_reshape)),
    example("partial", partial, table=4),
    example("last part", last_part, table=4),
    example("part by step", part_by_step, table=4),
    example("heads split off", packed),
    example("deepseek", deepseek),
    example(
        "widened, bf16",
        lambda x, cos, sin: rotated(half)(x.float(), cos, sin).to(x.dtype),
        dtype=torch.bfloat16,
    ),
    example("widened apart, bf16", cast_apart, dtype=torch.bfloat16),
)

NEAR_MISSES = (
    example("swapped halves", rotated(swapped), "the halves are swapped"),
    example("uneven parts", rotated(uneven), "the parts are not the two halves"),
    example("swapped pairs", rotated(swapped_pairs), "the first entry of each pair is negated"),
    example("one value a row", rotated(half), "do not have a value for each rotated entry", table=1),
)
