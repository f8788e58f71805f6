"""Building what is added to the scores of an attention: one tensor of one to four dims."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, dtype, rank
from regraft.passes.recognize.masks import Masks
from regraft.passes.recognize.scores import Addition, Condition

aten = torch.ops.aten


def build_bias(build: Builder, masks: Masks, leading: list[Any], lengths: tuple[Any, Any]) -> fx.Node | None:
    """The sum of all biases, or what the written-out masks make of zero; ``leading`` is ``[batch, heads]`` of the
    site, ``lengths`` are those of queries and keys."""
    total: fx.Node | None = None
    for item in masks.chain or masks.biases:
        if isinstance(item, Condition):
            total = _overwrite(build, total, item)
            continue
        term = _term(build, item, leading, lengths)
        total = term if total is None else build.call(aten.add.Tensor, total, term)
    if masks.chain and masks.least > -math.inf:
        total = build.call(aten.clamp.default, total, masks.least)
    if total is not None and rank(total) == 0:  # one number for all scores, as a weight: it broadcasts along a dim
        total = build.call(aten.reshape.default, total, [1])
    return total


def _overwrite(build: Builder, total: fx.Node | None, item: Condition) -> fx.Node:
    if total is None:
        device = item.condition.meta["val"].device
        total = build.call(aten.full.default, [], 0.0, dtype=item.dtype, device=device)
    condition = at_most_four(build, item.condition)
    if dtype(total) != item.dtype:  # what is written may be a number that the biases' own type does not have
        total = build.call(aten.to.dtype, total, torch.promote_types(dtype(total), item.dtype))
    if dtype(condition) != torch.bool:
        condition = build.call(aten.ne.Scalar, condition, 0)
    if item.masked_where_true:
        return build.call(aten.where.ScalarSelf, condition, item.fill, total)
    return build.call(aten.where.ScalarOther, condition, total, item.fill)


def _term(build: Builder, item: Addition, leading: list[Any], lengths: tuple[Any, Any]) -> fx.Node:
    if item.within is None:
        term = at_most_four(build, item.node)
    else:
        term = build.call(aten.expand.default, item.node, build.sizes(item.within))
        term = build.call(aten.reshape.default, term, [*leading, *lengths])
    return term if item.factor == 1 else build.call(aten.mul.Tensor, term, item.factor)


def at_most_four(build: Builder, node: fx.Node) -> fx.Node:
    """A mask over grouped heads without its group dim; others as they are."""
    if rank(node) <= 4:
        return node
    sizes = [build.size(node, dim) for dim in range(rank(node))]
    return build.call(aten.reshape.default, node, [*sizes[:1], *sizes[2:]])


def build_slopes(build: Builder, masks: Masks) -> fx.Node | None:
    """ALiBi's slopes ``[heads]``, with the sign and scale of the site."""
    if masks.slopes is None:
        return None
    node, factor = masks.slopes
    flat = node if rank(node) == 1 else build.call(aten.reshape.default, node, [-1])
    return flat if factor == 1 else build.call(aten.mul.Tensor, flat, factor)
