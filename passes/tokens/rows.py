"""Any tensor as ``[batch, tokens, everything else]`` and back: how operators on tokens reach tensors of any layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Batch, Factor, Layout, Span, batch_of, factors_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Counts:
    """How many tokens a span holds once some were removed; ``batch`` is the batch size as an argument of a call."""

    batch: Any
    tokens: int
    removed: int = 0

    def of(self, factor: Factor) -> Any:
        """The size of a factor as an argument of a call."""
        if isinstance(factor, Batch):
            return self.batch
        return factor.size - self.removed if isinstance(factor, Span) else factor

    def shape(self, layout: Layout) -> list[Any]:
        """The shape of a tensor with this layout; a dim whose size is computed at run time is left as -1."""
        result = []
        for factors in layout:
            sizes = [self.of(factor) for factor in factors]
            known = all(isinstance(size, int) for size in sizes)
            product = 1
            for size in sizes if known else ():
                product *= size
            result.append(product if known else sizes[0] if len(sizes) == 1 else -1)
        return result


def to_rows(build: Builder, node: fx.Node, layout: Layout, counts: Counts) -> fx.Node:
    """``node`` as ``[batch, tokens, features]``; what is the same for every sample is repeated."""
    factors = list(factors_of(layout))
    flat = build.call(aten.reshape.default, node, [counts.of(factor) for factor in factors])
    if batch_of(layout) is None:
        flat = build.call(aten.expand.default, flat, [counts.batch, *(counts.of(factor) for factor in factors)])
        factors.insert(0, Batch(counts.batch))
    order = _order(factors)
    if order != sorted(order):
        flat = build.call(aten.permute.default, flat, order)
    tokens = next(factor for factor in factors if isinstance(factor, Span))
    features = math.prod(counts.of(factor) for factor in factors if not isinstance(factor, (Batch, Span)))
    return build.call(aten.reshape.default, flat, [counts.batch, counts.of(tokens), features])


def from_rows(build: Builder, rows: fx.Node, layout: Layout, counts: Counts) -> fx.Node:
    """The inverse of ``to_rows``, for a layout that has a batch."""
    factors = list(factors_of(layout))
    order = _order(factors)
    spread = build.call(aten.reshape.default, rows, [counts.of(factors[place]) for place in order])
    back = [order.index(place) for place in range(len(order))]
    if back != sorted(back):
        spread = build.call(aten.permute.default, spread, back)
    if all(len(factors) == 1 for factors in layout):
        return spread
    return build.call(aten.reshape.default, spread, counts.shape(layout))


def _order(factors: Sequence[Factor]) -> list[int]:
    """Places of the batch, the tokens, and the others in their order."""
    batch = next(place for place, factor in enumerate(factors) if isinstance(factor, Batch))
    tokens = next(place for place, factor in enumerate(factors) if isinstance(factor, Span))
    return [batch, tokens, *(place for place in range(len(factors)) if place not in (batch, tokens))]


def with_batch(layout: Layout, target: Layout) -> Layout:
    """``layout`` of a value that is the same for every sample, once it differs: the batch lies where ``target`` has
    it. Raises ``Refused`` where the batch shares its dim with something that the value does not have."""
    if batch_of(layout) is not None:
        return layout
    spread: list[tuple[Factor, ...]] = [()] * (len(target) - len(layout)) + list(layout)
    for dim, factors in enumerate(target):
        if any(isinstance(factor, Batch) for factor in factors):
            if len(factors) > 1 and not spread[dim]:
                raise Refused("what is the same for all heads meets samples and heads in one dim")
            spread[dim] = (*(factor for factor in factors if isinstance(factor, Batch)), *spread[dim])
    return tuple(spread)
