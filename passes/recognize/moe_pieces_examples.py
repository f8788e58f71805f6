"""Pairs that are cut into one piece an expert as models spell it, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.passes.recognize import moe_examples, moe_loop_examples
from regraft.passes.recognize.moe_examples import swiglu

_TOKENS, _EXPERTS, _TOP_K, _HIDDEN = 5, 3, 2, 8
Pieces = Sequence[Tensor]
Joined = Callable[[list[Tensor]], list[Tensor]]


def counted(index: Tensor) -> Tensor:
    """Pairs of each expert, by a table of ones."""
    return torch.zeros(_TOKENS, _EXPERTS).scatter(1, index, 1).long().sum(0)


def by_one_hot(index: Tensor) -> Tensor:
    """Pairs of each expert, by one-hot rows."""
    return F.one_hot(index.flatten(), _EXPERTS).sum(0)


def each_projection(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shifted: int = 0,
) -> Tensor:
    """Each projection cuts the rows and joins them again."""
    order = torch.sort(index.reshape(-1))[1]
    counts = by_one_hot(index)
    sizes = (counts.roll(shifted) if shifted else counts).tolist()
    token = torch.div(order, _TOP_K, rounding_mode="trunc")

    def project(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        made = [
            F.linear(piece, matrices[number], None if bias is None else bias[number])
            for number, piece in enumerate(rows.split(sizes))
        ]
        return torch.cat(made)

    out = project(swiglu(project(x[token], first, first_bias)), down, down_bias)
    return torch.zeros_like(x).index_add(0, token, out * weight.reshape(-1)[order][:, None])


def other_sizes(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """The sizes are those of the next expert."""
    return each_projection(x, index, weight, first, down, shifted=1)


def one_projection(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """Experts that are a projection and no more, as those of attention are."""
    order = torch.sort(index.reshape(-1))[1]
    pieces = x[order // _TOP_K].split(by_one_hot(index).tolist())
    out = torch.cat([F.linear(piece, down[number]) for number, piece in enumerate(pieces)])
    return torch.zeros_like(x).index_add(0, order // _TOP_K, out * weight.reshape(-1)[order][:, None])


def whole_experts(
    sort: bool = True, count: Callable[[Tensor], Tensor] = counted, joined: Joined = lambda made: made
) -> moe_loop_examples.Combine:
    """Each expert runs whole on its piece; ``joined`` orders the results."""

    def combine(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
        pairs = index.flatten()
        order = pairs.sort(0)[1] if sort else torch.arange(pairs.shape[0])
        token = order // _TOP_K
        pieces = x[token].split(count(index).tolist())
        out = torch.cat(joined([expert(number, piece) for number, piece in enumerate(pieces)]))
        return torch.zeros_like(x).index_add(0, token, out * weight.flatten()[order].unsqueeze(-1))

    return combine


def brought_back(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The outputs go back to the order of the tokens before they are weighted."""
    order = torch.argsort(index.flatten())
    made = [expert(number, piece) for number, piece in enumerate(x[order // _TOP_K].split(counted(index).tolist()))]
    out = torch.cat(made)[torch.argsort(order)].view(_TOKENS, _TOP_K, _HIDDEN)
    return (out * weight.unsqueeze(-1)).sum(1)


def _plain(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    return each_projection(x, index, weight, first, down)


PIECES = (
    moe_examples.example("cut for each projection", _plain),
    moe_examples.example("cut for each projection, biases", each_projection),
    moe_loop_examples.example("cut once", whole_experts()),
    moe_loop_examples.example("cut once, biases", whole_experts(count=by_one_hot), bias=True),
    moe_loop_examples.example("cut once, stacked weights", whole_experts(), stacked=True),
    moe_loop_examples.example("cut once and brought back", brought_back),
)

PIECES_NEAR_MISSES = (
    moe_examples.example("sizes of other experts", other_sizes, reason="not as long as the counts"),
    moe_examples.example("experts of one projection", one_projection, reason="one projection, not two"),
    moe_loop_examples.example(
        "joined backwards", whole_experts(joined=lambda made: made[::-1]), reason="not joined in the order"
    ),
    moe_loop_examples.example("pairs not sorted", whole_experts(sort=False), reason="not of the same pairs"),
    moe_loop_examples.example(
        "an expert of another function", whole_experts(), odd=True, reason="compute different functions"
    ),
)
