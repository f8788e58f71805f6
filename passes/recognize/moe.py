"""Recognise the routed experts of a MoE block that runs on token-expert pairs, sorted by expert or not.

Covers grouped products over sorted pairs, batched products with gathered weights, and sorted pairs that are cut into
one piece an expert; ``moe_loop.py`` covers loops over experts that add up. The region starts where the outputs of
each token's experts are summed, and ends at the tokens, the expert index and the routing weights: the router and
shared experts stay outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.ir.pattern import anything, either, operator
from regraft.ir.program import Program
from regraft.ir.rule import Match
from regraft.passes.recognize import moe_examples as shown
from regraft.passes.recognize import moe_pieces_examples as pieces_shown
from regraft.passes.recognize.moe_experts import Experts, Gate, Projection, Refused, float_source, read_gate
from regraft.passes.recognize.moe_pieces import read_pieces
from regraft.passes.recognize.moe_products import read_product
from regraft.passes.recognize.moe_rows import (
    ZEROS,
    Ids,
    Tokens,
    picked,
    read_token_numbers,
    read_tokens,
    read_weights,
    undone_by,
)
from regraft.passes.recognize.moe_rule import RecognizeExperts
from regraft.passes.recognize.moe_weights import join_experts, read_expert

aten = torch.ops.aten
total = operator(aten.sum.dim_IntList)
index_add = operator(aten.index_add.default)


class RecognizeMoe(RecognizeExperts):
    """``sum over k of weight * expert(token)`` computed on one row a token-expert pair."""

    examples = (*shown.PAIRS, *pieces_shown.PIECES)
    near_misses = (*shown.PAIRS_NEAR_MISSES, *pieces_shown.PIECES_NEAR_MISSES)

    def pattern(self, pairs: Any) -> Any:
        return either(
            total(pairs, [-2]),
            index_add(anything("base"), anything("dim"), anything("tokens"), pairs),
        )

    def read(self, match: Match) -> Experts | None:
        walk = _walk(match)
        return None if walk is None else _experts(match.root, walk, match.program)


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
        walk.base = None if is_call(match.base, ZEROS) else match.base
    while read_product(walk.product, match.program) is None and read_pieces(walk.product) is None:
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
    if not is_tensor(factor) or not is_tensor(value) or not rank(factor):
        return False
    if not size_equal(shape(factor)[-1], 1) or size_equal(shape(value)[-1], 1):
        return False
    if rank(value) == 2 and free_unbacked_symbols(shape(value)[0]):  # joined pieces: there are as many as pairs
        return rank(factor) == 2
    return sizes_equal(shape(factor)[:-1], shape(value)[:-1])


@dataclass
class _Computed:
    """What the experts compute, of which tokens, and the nodes that nothing outside of it may read."""

    gate: Gate
    first: Projection
    down: Projection
    up: Projection | None
    tokens: Tokens
    ids: Ids
    inside: tuple[fx.Node, ...]


def _experts(root: fx.Node, walk: _Walk, program: Program) -> Experts:
    found = _by_products(walk.product, program) or _by_pieces(walk.product, program)
    tokens = found.tokens
    if not found.ids.fit(found.ids.flat, tokens.order):
        raise Refused("the projections of the experts are not of the same pairs", found.gate.first)
    if walk.order is not tokens.order:
        raise Refused("the expert outputs are not brought back to the order of the tokens", walk.product)
    if walk.weight is None:
        raise Refused("the expert outputs are not multiplied by routing weights", walk.product)
    weight = read_weights(walk.weight, walk.weight_order)
    _check_pairs(root, walk, tokens, weight)
    for node in found.inside:
        if len({user for user in node.users if not is_call(user, (aten.slice.Tensor,))}) > 1:
            raise Refused("the expert outputs are used elsewhere", node)
    index, cast = found.ids.flat, tokens.cast
    return Experts(
        tokens.hidden, index, weight, tokens.top_k, found.gate, found.first, found.down, found.up, cast, walk.base
    )


def _by_products(product: fx.Node, program: Program) -> _Computed | None:
    """Experts whose projections are of all pairs at once."""
    read = read_product(product, program)
    if read is None:
        return None
    down, ids = read
    inner = float_source(down.rows)
    if picked(inner) is not None:
        raise Refused("the experts are one projection, not two with a gate function between them", product)
    gate = read_gate(inner)
    first, tokens = _projection(gate.first, ids.flat, program)
    up, up_tokens = _projection(gate.up, ids.flat, program) if gate.up is not None else (None, tokens)
    if up_tokens != tokens:
        raise Refused("the projections of the experts are not of the same pairs", gate.first)
    return _Computed(gate, first, down, up, tokens, ids, (product, gate.first))


def _by_pieces(product: fx.Node, program: Program) -> _Computed:
    """Experts each of which runs whole on its piece of the sorted pairs."""
    pieces = read_pieces(product)
    assert pieces is not None
    experts = [read_expert(part) for part in pieces.made]
    if [expert.rows for expert in experts] != list(pieces.cut):
        raise Refused("an expert does not run on the tokens that chose it", product)
    first, down, *up = join_experts(pieces.rows, experts, program)
    tokens, ids = read_tokens(pieces.rows), Ids(pieces.flat, None, grouped=True)
    return _Computed(experts[0].gate, first, down, up[0] if up else None, tokens, ids, (product,))


def _projection(node: fx.Node, flat: fx.Node, program: Program) -> tuple[Projection, Tokens]:
    """A first projection and the tokens that it is of; raises ``Refused``."""
    read = read_product(float_source(node), program)
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
