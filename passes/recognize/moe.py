"""Recognise the routed experts of a MoE block that runs on token-expert pairs, sorted by expert or not.

Covers grouped products over sorted pairs and batched products with gathered weights; ``moe_loop.py`` covers
loops over experts. The region starts where the outputs of each token's experts are summed, and ends at the
tokens, the expert index and the routing weights: the router and shared experts stay outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.ir.pattern import anything, either, operator
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import moe_examples as shown
from regraft.passes.recognize.moe_experts import (
    Experts,
    Projection,
    Refused,
    build_experts,
    float_source,
    read_gate,
    same_storage,
)
from regraft.passes.recognize.moe_rows import (
    Tokens,
    picked,
    read_product,
    read_token_numbers,
    read_tokens,
    read_weights,
    undone_by,
)

aten = torch.ops.aten
total = operator(aten.sum.dim_IntList)
index_add = operator(aten.index_add.default)

_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)


class RecognizeMoe(Rule):
    """``sum over k of weight * expert(token)`` computed on one row a token-expert pair."""

    recognizes = "moe"
    examples = shown.PAIRS
    near_misses = shown.PAIRS_NEAR_MISSES

    def pattern(self, pairs: Any) -> Any:
        return either(
            total(pairs, [-2]),
            index_add(anything("base"), anything("dim"), anything("tokens"), pairs),
        )

    def check(self, match: Match) -> Iterator[Requirement]:
        found = analyse(match)
        if isinstance(found, Refused):
            yield need(False, found.reason, found.node)

    def replace(self, match: Match, build: Builder) -> Replacement:
        found = analyse(match)
        return None if found is None or isinstance(found, Refused) else emit(build, match.root, found)


def emit(build: Builder, root: fx.Node, experts: Experts) -> fx.Node:
    """The operator, with all of its weights stored alike."""
    stored = experts.down.transposed
    first = same_storage(build, experts.first, stored)
    up = None if experts.up is None else same_storage(build, experts.up, stored)
    fields = {**vars(experts), "first": first, "up": up}
    return build_experts(build, root, Experts(**fields))


def analyse(match: Match) -> Experts | Refused | None:
    """The experts that end in the match; what refuses them; None where no experts end."""
    try:
        walk = _walk(match)
        return None if walk is None else _experts(match.root, walk)
    except Refused as refused:
        return refused


@dataclass
class _Walk:
    """From the sum to the experts' last projection: its node, the routing weights and the order of its
    rows."""

    product: fx.Node
    weight: fx.Node | None = None
    weight_order: fx.Node | None = None
    order: fx.Node | None = None
    top_k: int | None = None
    base: fx.Node | None = None


def _walk(match: Match) -> _Walk | None:
    walk = _Walk(match.pairs)
    if "tokens" in match:
        numbers = read_token_numbers(match.tokens)
        if numbers is None or match.dim not in (0, -2) or arguments(match.root)["alpha"] != 1:
            return None
        walk.top_k, walk.order = numbers
        walk.base = None if is_call(match.base, _ZEROS) else match.base
    while read_product(walk.product) is None:
        if not _step(walk):
            return None
    return walk


def _step(walk: _Walk) -> bool:
    """One node towards the inputs, through what only moves, casts or weights the expert outputs."""
    node: Any = walk.product
    if is_call(node, (aten.mul.Tensor,)) and walk.weight is None:
        for value, factor in (node.args, node.args[::-1]):
            if _weighs(factor, value):
                walk.weight, walk.weight_order, walk.product = factor, walk.order, value
                return True
        return False
    pick = picked(node)
    if pick is not None and rank(pick[0]) == 2 and walk.order is None:
        walk.order = undone_by(pick[1]) or pick[1]
        walk.product = pick[0]
        return True
    moved = is_call(node, (aten.reshape.default,)) or float_source(node) is not node
    if moved:
        walk.product = node.args[0]
    return moved


def _weighs(factor: Any, value: Any) -> bool:
    """Whether ``factor`` is one number for each row of ``value``."""
    if not is_tensor(factor) or not is_tensor(value) or shape(factor)[-1:] != (1,) or shape(value)[-1] == 1:
        return False
    return sizes_equal(shape(factor)[:-1], shape(value)[:-1])


def _experts(root: fx.Node, walk: _Walk) -> Experts:
    read = read_product(walk.product)
    assert read is not None
    down, ids = read
    gate = read_gate(float_source(down.rows))
    first, tokens = _projection(gate.first, ids.flat)
    up, up_tokens = _projection(gate.up, ids.flat) if gate.up is not None else (None, tokens)
    if up_tokens != tokens or not ids.fit(ids.flat, tokens.order):
        raise Refused("the projections of the experts are not of the same pairs", gate.first)
    if walk.order is not tokens.order:
        raise Refused("the expert outputs are not brought back to the order of the tokens", walk.product)
    if walk.weight is None:
        raise Refused("the expert outputs are not multiplied by routing weights", walk.product)
    weight = read_weights(walk.weight, walk.weight_order)
    _check_pairs(root, walk, tokens, weight)
    for node in (walk.product, gate.first):
        if len({user for user in node.users if not is_call(user, (aten.slice.Tensor,))}) > 1:
            raise Refused("the expert outputs are used elsewhere", node)
    return Experts(tokens.hidden, ids.flat, weight, tokens.top_k, gate, first, down, up, tokens.cast, walk.base)


def _projection(node: fx.Node, flat: fx.Node) -> tuple[Projection, Tokens]:
    """A first projection and the tokens that it is of; raises ``Refused``."""
    read = read_product(float_source(node))
    if read is None:
        raise Refused("the input of the gate function is no projection by the experts", node)
    projection, ids = read
    tokens = read_tokens(projection.rows)
    if not ids.fit(flat, tokens.order):
        raise Refused("the rows of the tokens are in another order than their expert ids", projection.rows)
    return projection, tokens


def _check_pairs(root: fx.Node, walk: _Walk, tokens: Tokens, weight: fx.Node) -> None:
    top_k = tokens.top_k
    pairs: Any = root.args[0]
    summed = walk.top_k if walk.top_k is not None else shape(pairs)[-2]
    if summed != top_k:
        raise Refused(f"{summed} expert outputs are summed where each token has {top_k}", root)
    if rank(tokens.hidden) != 2 or rank(root) != 2 or not size_equal(shape(root)[0], shape(tokens.hidden)[0]):
        raise Refused("the sum does not have a row for each token", root)
    if rank(weight) == 2 and shape(weight)[-1] not in (1, top_k):
        raise Refused("the routing weights are not one for each pair", weight)
