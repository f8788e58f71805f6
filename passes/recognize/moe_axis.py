"""Recognise routed experts that lie along a dim of the tensors: all of them, or those that a token chose.

``sum over e of table[t, e] * expert_e(x[t])`` computes every expert for every token, and a table of the router is zero
where it did not choose one; ``sum over k of weight[t, k] * expert_{index[t, k]}(x[t])`` gathers the weights of the
chosen experts. Either is read from its products by label (``labels.py``), so that the order of dims, einsum, matmul
or a sum of products make no difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import arguments, dtype, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.ops.activation import activate
from regraft.ir.pattern import either, matmul, mul, operator
from regraft.ir.program import Program
from regraft.ir.rule import Match
from regraft.passes.recognize import moe_axis_examples as shown
from regraft.passes.recognize.labels import (
    Label,
    Labelled,
    Merged,
    broadcast,
    contraction,
    factors,
    labelled,
    sum_of,
    terms,
    unviewed,
)
from regraft.passes.recognize.moe_experts import Experts, Gate, Projection, Refused, float_source, read_gate
from regraft.passes.recognize.moe_rows import counts_rows, picked
from regraft.passes.recognize.moe_rule import RecognizeExperts
from regraft.passes.recognize.moe_table import named_index, top_k_of, weighted_index
from regraft.passes.recognize.moe_weights import join_experts, read_expert

aten = torch.ops.aten
total = operator(aten.sum.dim_IntList)


class RecognizeMoeAxis(RecognizeExperts):
    """A sum over the dim that experts, or a token's experts, lie along."""

    examples = shown.AXIS
    near_misses = shown.AXIS_NEAR_MISSES

    def pattern(self, left: Any, right: Any) -> Any:
        sums = (total(left, [dim]) for dim in (-1, -2, -3, -4))
        return either(*sums, matmul(left, right), mul(left, right))

    def read(self, match: Match) -> Experts | None:
        root = labelled(match.root)
        ending = _read_ending(root)
        if ending is None:
            return _of_one(root)
        everywhere, ids = _experts_axis(ending)
        parts, down = _stacked(everywhere), _read_projection(everywhere.outputs, ending.feature)
        if parts is None and (down is None or not down.by_experts(everywhere.axis)):
            return _of_one(root)
        try:
            if parts is not None:
                return _of_parts(ending, everywhere, parts, ids, match.program)
            assert down is not None
            return _of_products(ending, down, ids)
        except _FoundExperts:
            raise
        except Refused:
            routed = ids is not None or (down is not None and down.ids is not None)
            if routed or _table(ending.weights) is not None:
                raise
            return None


def _of_one(root: Labelled) -> Experts | None:
    """Experts of which each token has one, by matrices that were gathered for it: nothing is summed, and there may be
    no weights."""
    if not root.present:
        return None
    ways: list[tuple[Labelled, Labelled | None]] = [(root, None)]
    pair = factors(root)
    if pair is not None:
        ways = [(outputs, weights) for outputs, weights in (pair, pair[::-1]) if root.present[-1] not in weights.labels]
    for outputs, weights in ways:
        down = _read_projection(outputs, root.present[-1])
        if down is None or down.ids is None:
            continue
        try:
            ending = _Ending(root, outputs, None if weights is None else unviewed(weights), None)
            return _of_products(ending, down, None)
        except Refused:
            return None
    return None


class _FoundExperts(Refused):
    """Experts that were read whole, and are not routed as the operator can say."""


@dataclass(frozen=True)
class _Ending:
    """``outputs [tokens, axis, features]`` times ``weights [tokens, axis]``, summed over ``axis``."""

    root: Labelled
    outputs: Labelled
    weights: Labelled | None
    axis: Label

    @property
    def feature(self) -> Label:
        return self.root.present[-1]

    @property
    def tokens(self) -> tuple[Label, ...]:
        return self.root.present[:-1]

    def pairs(self, one: Labelled | None) -> bool:
        """Whether a tensor has one entry for each token and place on the axis, in this order."""
        return one is not None and one.present == (*self.tokens, *([] if self.axis is None else [self.axis]))


def _read_ending(root: Labelled) -> _Ending | None:
    if not root.present:
        return None
    feature, product = root.present[-1], contraction(root)
    if product is None:
        summed = sum_of(root)
        return None if summed is None else _Ending(root, unviewed(summed[0]), None, summed[1])
    for outputs, weights in ((product.left, product.right), (product.right, product.left)):
        if feature in outputs.labels and feature not in weights.labels:
            return _Ending(root, unviewed(outputs), unviewed(weights), product.inner)
    return None


def _experts_axis(ending: _Ending) -> tuple[_Ending, Labelled | None]:
    """The ending as it is before each token's experts are picked of all outputs, and the ids that pick them."""
    pick = _picked_along(ending.outputs.node)
    if pick is None:
        return ending, None
    table, dim, index = pick
    node, labels = ending.outputs.node, ending.outputs.labels
    ids = unviewed(broadcast(index, labels[: rank(index)] if rank(index) < rank(node) else labels))
    if labels[dim] != ending.axis or not ending.pairs(ids):
        return ending, None
    everywhere: Label = (node, -3)
    outputs = Labelled(table, (*labels[:dim], everywhere, *labels[dim + 1 :]))
    return replace(ending, outputs=unviewed(outputs), axis=everywhere), ids


def _picked_along(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """``(table, dim, index)`` of entries that an index picks along one dim, others as they are."""
    if is_call(node, (aten.gather.default,)):
        table, dim, index = arguments(node)["self"], arguments(node)["dim"] % rank(node), arguments(node)["index"]
        kept = [(a, b) for place, (a, b) in enumerate(zip(shape(table), shape(node), strict=True)) if place != dim]
        return (table, dim, index) if all(size_equal(*sizes) for sizes in kept) else None
    if is_call(node, (aten.index.Tensor,)) and len(arguments(node)["indices"]) == 2:
        rows, index = arguments(node)["indices"]
        counted = is_tensor(rows) and is_tensor(index) and rank(index) == 2 and counts_rows(rows, index)
        return (arguments(node)["self"], 1, index) if counted else None
    return None


@dataclass(frozen=True)
class _Product:
    """A projection by experts: of ``rows``, by matrices that ``ids`` gathered, or by those of all experts on the dim
    ``axis``."""

    rows: Labelled
    projection: Projection
    inner: Label
    axis: Label
    ids: Labelled | None

    def by_experts(self, axis: Label) -> bool:
        """Whether the experts lie along ``axis``."""
        return self.ids is not None or (axis is not None and self.axis == axis)

    def same_pairs(self, other: _Product) -> bool:
        """Whether another product has the same experts for the same rows."""
        if self.ids is None or other.ids is None:
            return self.ids is other.ids and self.axis == other.axis
        return (self.ids.node, self.ids.present) == (other.ids.node, other.ids.present)

    def same_rows(self, other: _Product) -> bool:
        """Whether another product is of the same rows."""
        same_dims = self._outer_labels == other._outer_labels
        return self.rows.node is other.rows.node and same_dims

    @property
    def _outer_labels(self) -> tuple[Label, ...]:
        return tuple(None if label == self.inner else label for label in self.rows.labels)


def _read_projection(one: Labelled, out: Label) -> _Product | None:
    one = unviewed(one)
    pair = terms(one)
    for product, bias in ((one, None),) if pair is None else (pair, pair[::-1]):
        read = contraction(product)
        for rows, matrices in () if read is None else ((read.left, read.right), (read.right, read.left)):
            assert read is not None
            found = _read_matrices(unviewed(matrices), out, read.inner)
            if found is None or read.inner not in rows.labels or out in rows.labels:
                continue
            weight, transposed, axis, ids = found
            made = _Product(unviewed(rows), Projection(rows.node, weight, None, transposed), read.inner, axis, ids)
            return made if bias is None else _with_bias(made, unviewed(bias), out)
    return None


def _read_matrices(one: Labelled, out: Label, inner: Label) -> tuple[fx.Node, bool, Label, Labelled | None] | None:
    """The matrices of all experts, whether they are stored transposed, and their axis or the ids that gathered them."""
    if out is None or inner is None or one.labels[-2:] not in ((out, inner), (inner, out)):
        return None
    transposed = one.labels[-1] == out
    pick = picked(one.node)
    if pick is not None and isinstance(pick[1], fx.Node) and rank(pick[0]) == 3:
        weight, stored = untransposed(pick[0], transposed)
        return weight, stored, None, unviewed(Labelled(pick[1], one.labels[:-2]))
    return (one.node, transposed, one.labels[0], None) if rank(one.node) == 3 else None


def untransposed(weight: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    """Matrices without a swap of their dims, and whether they are then stored transposed."""
    if is_call(weight, (aten.permute.default,)) and list(arguments(weight)["dims"]) == [0, 2, 1]:
        return arguments(weight)["self"], not transposed
    return weight, transposed


def _with_bias(made: _Product, bias: Labelled, out: Label) -> _Product | None:
    """The product with a bias of each expert; None where what is added is none."""
    node, pick = bias.node, picked(bias.node)
    if made.ids is not None:
        if pick is None or not isinstance(pick[1], fx.Node) or rank(pick[0]) != 2 or bias.labels[-1] != out:
            return None
        ids = unviewed(Labelled(pick[1], bias.labels[:-1]))
        if (ids.node, ids.present) != (made.ids.node, made.ids.present):
            raise Refused("the bias is picked by other expert ids than the weight", node)
        node = pick[0]
    elif bias.labels != (made.axis, out):
        return None
    one = made.projection
    return replace(made, projection=Projection(one.rows, one.weight, node, one.transposed))


def _of_products(ending: _Ending, down: _Product, ids: Labelled | None) -> Experts:
    gate = read_gate(down.rows.node)
    labels = down.rows.labels
    split = gate.layout not in ("separate", "single")
    if split and labels[-1] != down.inner:
        raise Refused("gate and up are not halves of the last dim", down.rows.node)
    out: Label = (gate.first, -2) if split else down.inner
    first = _first(gate.first, (*labels[:-1], out) if split else labels, out)
    up = None if gate.up is None else _first(gate.up, labels, out)
    for other in (down, *([] if up is None else [up])):
        if not first.same_pairs(other):
            raise Refused("the projections of the experts are not of the same pairs", other.rows.node)
    if up is not None and not up.same_rows(first):
        raise Refused("gate and up are projections of different inputs", up.rows.node)
    projections = first.projection, down.projection, None if up is None else up.projection
    return _joined(ending, gate, projections, first, ids or down.ids)


def _first(node: fx.Node, labels: tuple[Label, ...], out: Label) -> _Product:
    read = _read_projection(Labelled(node, labels), out) if rank(node) == len(labels) else None
    if read is None:
        raise Refused("the input of the gate function is no projection by the experts", node)
    return read


def _joined(
    ending: _Ending,
    gate: Gate,
    projections: tuple[Projection, Projection, Projection | None],
    first: _Product,
    ids: Labelled | None,
) -> Experts:
    hidden = first.rows
    scaled = None if ending.weights is not None or ids is not None else _scaled_inputs(ending, gate, projections, first)
    if scaled is not None:
        return scaled
    if hidden.present != (*ending.tokens, first.inner):
        raise _FoundExperts("the experts do not run on the tokens themselves", hidden.node)
    cast = dtype(first.projection.rows)
    weighted = ending.weights is not None and ending.pairs(ending.weights)
    alone = ending.weights is None and ids is not None and ending.axis is None
    if not weighted and not alone:
        raise _FoundExperts("the expert outputs are not multiplied by routing weights", ending.root.node)
    weight = None if ending.weights is None else ending.weights.node
    if ids is not None:
        if not ending.pairs(ids):
            raise _FoundExperts("the expert ids are not one for each pair", ids.node)
        return Experts(hidden.node, ids.node, weight, _extent(ids, ending.axis), gate, *projections, cast)
    routing = _table(ending.weights)
    if routing is None:
        raise _FoundExperts(
            "the routing weights are not zero for sure of the experts that a token did not choose", weight
        )
    index, weight, top_k, table = routing
    return Experts(hidden.node, index, weight, top_k, gate, *projections, cast, table=table)


def _scaled_inputs(
    ending: _Ending, gate: Gate, projections: tuple[Projection, Projection, Projection | None], first: _Product
) -> Experts | None:
    """Experts whose inputs a table of the router scales, and which make nothing of nothing (Llama 4)."""
    pair = factors(first.rows)
    for x, scores in () if pair is None else (pair, pair[::-1]):
        tokens, table = unviewed(x), unviewed(scores)
        routing = _table(table)
        if tokens.present != (*ending.tokens, first.inner) or not ending.pairs(table) or routing is None:
            continue
        index, weight, top_k, whole = routing
        biased = any(part is not None and part.bias is not None for part in projections)
        bare = gate.layout == "single" or gate.up_offset != 0
        opens = (
            bare and gate.activation != "swish" and bool(activate(torch.zeros(1, dtype=torch.float32), gate.activation))
        )
        if top_k != 1 or biased or opens:
            raise _FoundExperts("the inputs of several experts, or of experts with biases, are scaled", weight)
        cast = dtype(first.projection.rows)
        return Experts(tokens.node, index, weight, 1, gate, *projections, cast, table=whole, scaled=True)
    return None


def _extent(one: Labelled, axis: Label) -> int:
    return 1 if axis is None else int(dict(one.atoms)[axis])  # type: ignore[index]


def _table(weights: Labelled | None) -> tuple[fx.Node, fx.Node, int, bool] | None:
    """Index, weight, the number of experts of a token, and whether the weight is the table itself."""
    if weights is None:
        return None
    found = weighted_index(weights.node)
    index = found[0] if found is not None else named_index(weights.node)
    if index is None:
        return None
    top_k = top_k_of(index, shape(weights.node)[:-1])
    if top_k is None:
        return None
    return (index, weights.node, top_k, True) if found is None else (*found, top_k, False)


def _stacked(ending: _Ending) -> tuple[fx.Node, ...] | None:
    """The tensors that are the entries of the axis, where the outputs are stacked of them."""
    node, labels, axis = ending.outputs.node, ending.outputs.labels, ending.axis
    if not is_call(node, (aten.stack.default, aten.cat.default)):
        return None
    parts, dim = arguments(node)["tensors"], arguments(node)["dim"] % rank(node)
    label = labels[dim]
    if node.target is aten.cat.default and isinstance(label, Merged):  # side by side in the last dim, then parted
        whole = label.atoms[0] == (axis, len(parts)) and len({shape(part)[dim] for part in parts}) == 1
        return tuple(parts) if whole else None
    if axis is None or label != axis or len(parts) != shape(node)[dim]:
        return None
    if node.target is aten.stack.default:
        return tuple(parts)
    lifted = all(is_call(part, (aten.unsqueeze.default,)) for part in parts)
    return tuple(part.args[0] for part in parts) if lifted else None


def _of_parts(
    ending: _Ending, everywhere: _Ending, parts: tuple[fx.Node, ...], ids: Labelled | None, program: Program
) -> Experts:
    experts = [read_expert(float_source(part)) for part in parts]
    rows = experts[0].rows
    odd = next((expert for expert in experts if expert.rows is not rows), None)
    if odd is not None:
        raise Refused("the experts run on different inputs", odd.rows)
    first, down, *up = join_experts(rows, experts, program)
    inner: Label = (rows, -1)
    *leading, feature = (name for name in everywhere.outputs.present if name != everywhere.axis)
    if feature != ending.feature or rank(rows) != len(leading) + 1:
        raise Refused("the features of the expert outputs are not their last dim", rows)
    made = _Product(Labelled(rows, (*leading, inner)), first, inner, everywhere.axis, None)
    return _joined(ending, experts[0].gate, (first, down, up[0] if up else None), made, ids)
