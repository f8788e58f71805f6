"""Rows of token-expert pairs, and the order they are in.

Experts run on one row a pair: ``tokens * top_k`` rows. Rows in the *source order* are ``token * top_k + k``;
grouped products want them sorted by expert. An order is named by the node that sorts the expert ids
(``sort`` or ``argsort``); None is the source order. Everything here reads which order a tensor is in, so
that a rule can demand that tokens, expert ids, weights and the way back all agree.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from regraft.ir.nodes import arguments, dtype, is_call, rank, shape, size_equal
from regraft.passes.recognize.moe_experts import Projection, Refused, float_source

aten = torch.ops.aten

#: Products of sorted rows with one matrix a group: ``(rows, matrices, offsets)``.
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
_BLANK = (aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default, aten.empty.memory_format)
_SORTS = (aten.sort.default, aten.sort.stable)
_INTEGERS = (torch.int32, torch.int64)


def order_of(node: Any) -> fx.Node | None:
    """The order that a permutation sorts into: the ``sort`` or ``argsort`` that made it; None for any other
    node."""
    if is_call(node, (operator.getitem,)) and node.args[1] == 1 and is_call(node.args[0], _SORTS):
        return cast(fx.Node, node.args[0])
    return cast(fx.Node, node) if is_call(node, (aten.argsort.default, aten.argsort.stable)) else None


def undone_by(inverse: Any) -> fx.Node | None:
    """The order that indexing with ``inverse`` brings back to the source order, None when it is no
    inverse."""
    if is_call(inverse, (aten.index_put.default,)):
        blank, where, values = inverse.args[:3]
        order = order_of(where[0]) if len(where) == 1 else None
        plain = not arguments(inverse)["accumulate"]
        return order if plain and is_call(blank, _BLANK) and _counts_up(values, inverse) else None
    if is_call(inverse, (aten.scatter.src,)):
        blank, _, permutation, values = inverse.args
        return order_of(permutation) if is_call(blank, _BLANK) and _counts_up(values, inverse) else None
    again = order_of(inverse)
    return order_of(again.args[0]) if again is not None and not _descending(again) else None


def _counts_up(node: Any, like: fx.Node) -> bool:
    if not is_call(node, (aten.arange.default, aten.arange.start, aten.arange.start_step)):
        return False
    given = arguments(node)
    return given.get("start", 0) == 0 and given.get("step", 1) == 1 and size_equal(shape(node)[0], shape(like)[0])


def _descending(order: fx.Node) -> bool:
    return bool(arguments(order).get("descending", False))


def picked(node: Any) -> tuple[fx.Node, Any] | None:
    """``(table, rows)`` of a node that picks entries of the first dimension of ``table``."""
    if is_call(node, (aten.index.Tensor,)) and len(node.args[1]) == 1:
        return node.args[0], node.args[1][0]
    if is_call(node, (aten.index_select.default,)) and node.args[1] in (0, -rank(node.args[0])):
        return node.args[0], node.args[2]
    return None


@dataclass(frozen=True)
class Ids:
    """Expert ids of some rows: ``flat`` in the source order, and the order that the rows are in.

    ``grouped`` rows must be sorted by expert; their order is None where only the rows themselves tell it.
    """

    flat: fx.Node
    order: fx.Node | None
    grouped: bool = False

    def fit(self, flat: fx.Node, order: fx.Node | None) -> bool:
        """Whether these are the ids ``flat`` of rows that are in ``order``."""
        if self.flat is not flat:
            return False
        if not self.grouped:
            return self.order is order
        return order is not None and self.order in (None, order) and sorted_ids(order) is flat


def read_ids(node: Any) -> Ids:
    """Expert ids, sorted or not; casts between integers and to float (for ``histc``) are looked through."""
    while is_call(node, (aten.to.dtype,)) and dtype(node) in (*_INTEGERS, torch.float32, torch.float64):
        node = node.args[0]
    if is_call(node, (operator.getitem,)) and node.args[1] == 0 and is_call(node.args[0], _SORTS):
        return Ids(read_ids(node.args[0].args[0]).flat, node.args[0])
    pick = picked(node)
    order = order_of(pick[1]) if pick is not None else None
    return Ids(read_ids(pick[0]).flat, order) if pick is not None and order is not None else Ids(node, None)


def sorted_ids(order: fx.Node) -> fx.Node:
    """The ids that an order sorts, in the source order; raises ``Refused`` when it sorts them the other way
    round."""
    if _descending(order):
        raise Refused("the pairs are sorted by descending expert", order)
    return read_ids(order.args[0]).flat


@dataclass(frozen=True)
class Tokens:
    """Rows of ``hidden [tokens, features]``, each token repeated ``top_k`` times, in ``order``."""

    hidden: fx.Node
    top_k: int
    order: fx.Node | None
    cast: torch.dtype | None = None


def read_tokens(rows: fx.Node) -> Tokens:
    """Which tokens the rows that enter the experts are; raises ``Refused``."""
    source: Any = float_source(rows)
    cast = dtype(rows) if source is not rows else None
    if is_call(source, (aten.repeat_interleave.self_int,)) and arguments(source)["dim"] in (0, -2):
        return Tokens(source.args[0], int(source.args[1]), None, cast)
    pick = picked(source)
    if pick is None:
        return Tokens(source, 1, None, cast)
    numbers = read_token_numbers(pick[1])
    if numbers is None:
        raise Refused("the rows that enter the experts are not the tokens of the pairs", source)
    return Tokens(pick[0], numbers[0], numbers[1], cast)


def read_token_numbers(node: Any) -> tuple[int, fx.Node | None] | None:
    """``(top_k, order)`` of token numbers: ``permutation // top_k``, or ``(arange //
    top_k)[permutation]``."""
    order = order_of(node)
    if order is not None:
        return 1, order
    pick = picked(node)
    if pick is not None and order_of(pick[1]) is not None:
        inner = read_token_numbers(pick[0])
        return (inner[0], order_of(pick[1])) if inner is not None and inner[1] is None else None
    if is_call(node, (aten.floor_divide.default, aten.div.Tensor_mode)) and isinstance(node.args[1], int):
        if node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") not in ("floor", "trunc"):
            return None
        if is_call(node.args[0], (aten.arange.default,)):
            return node.args[1], None
        order = order_of(node.args[0])
        return (node.args[1], order) if order is not None else None
    if is_call(node, (aten.repeat_interleave.self_int,)) and is_call(node.args[0], (aten.arange.default,)):
        return int(node.args[1]), None
    return None


def read_weights(node: Any, order: fx.Node | None) -> fx.Node:
    """The routing weights of rows in ``order``, before they were put into it; raises ``Refused``."""
    while True:
        if is_call(node, (aten.unsqueeze.default,)) or float_source(node) is not node:
            node = node.args[0]
            continue
        pick = picked(node)
        if is_call(node, (aten.reshape.default,)) and picked(node.args[0]) is not None:
            node = node.args[0]
        elif pick is not None and order is not None and order_of(pick[1]) is order:
            node, order = pick[0], None
        elif pick is not None and order_of(pick[1]) is not None:
            raise Refused("the routing weights are in another order than the expert outputs", node)
        else:
            break
    if order is not None:
        raise Refused("the routing weights are in another order than the expert outputs", node)
    return node


def read_product(node: Any) -> tuple[Projection, Ids] | None:
    """A projection of rows by the experts that ``ids`` selects, None for any other node.

    Raises ``Refused`` where the groups of a grouped product are not those of its rows.
    """
    bias: tuple[fx.Node, Any] | None = None
    if is_call(node, (aten.add.Tensor,)):
        for product, added in (node.args[:2], node.args[1::-1]):
            bias = picked(added)
            read = read_product(product) if bias is not None and rank(bias[0]) == 2 else None
            if read is not None and bias is not None:
                return _with_bias(read, bias, node)
        return None
    return _grouped(node) or _selected(node)


def _with_bias(read: tuple[Projection, Ids], bias: tuple[fx.Node, Any], node: fx.Node) -> tuple[Projection, Ids]:
    projection, ids = read
    picks = read_ids(bias[1])
    if picks.flat is not ids.flat or (picks.order is None if ids.grouped else picks.order is not ids.order):
        raise Refused("the bias is picked by other expert ids than the weight", node)
    with_bias = Projection(projection.rows, projection.weight, bias[0], projection.transposed)
    return with_bias, Ids(ids.flat, picks.order, ids.grouped)


def _grouped(node: Any) -> tuple[Projection, Ids] | None:
    schema = getattr(getattr(node, "target", None), "_schema", None)
    if schema is None or schema.name not in _GROUPED:
        return None
    rows, matrices, offsets = node.args[:3] if len(node.args) > 2 else (*node.args[:2], node.kwargs.get("offs"))
    if rank(matrices) != 3 or rank(rows) != 2 or node.kwargs.get("bias") is not None:
        return None
    flat = _counted_ids(offsets, shape(matrices)[0])
    if flat is None:
        raise Refused("the groups of the product do not count the pairs of each expert", node)
    weight, transposed = _untransposed(matrices)
    return Projection(rows, weight, None, transposed), Ids(flat, None, grouped=True)


def _counted_ids(offsets: Any, experts: Any) -> fx.Node | None:
    """The flat expert ids whose running count the offsets are."""
    while is_call(offsets, (aten.to.dtype,)):
        offsets = offsets.args[0]
    if not is_call(offsets, (aten.cumsum.default,)):
        return None
    counts = offsets.args[0]
    while is_call(counts, (aten.to.dtype,)):
        counts = counts.args[0]
    given = arguments(counts) if isinstance(counts, fx.Node) and counts.op == "call_function" else {}
    if is_call(counts, (aten.histc.default,)):
        whole = (given["bins"], given["min"], given["max"]) == (experts, 0, experts - 1)
        return read_ids(given["self"]).flat if whole else None
    if is_call(counts, (aten.bincount.default,)) and given["weights"] is None and given["minlength"] == experts:
        return read_ids(given["self"]).flat
    return None


def _selected(node: Any) -> tuple[Projection, Ids] | None:
    """``squeeze(W[ids] @ rows[:, :, None])`` or ``squeeze(rows[:, None] @ W[ids])``."""
    if not is_call(node, (aten.reshape.default,)) or not is_call(node.args[0], (aten.matmul.default,)):
        return None
    left, right = node.args[0].args
    for matrices, rows, turned, unit in ((left, right, False, -1), (right, left, True, -2)):
        select, permuted = _permuted(matrices)
        pick = picked(select)
        if pick is None or rank(pick[0]) != 3 or rank(rows) != 3 or shape(rows)[unit] != 1:
            continue
        if not is_call(rows, (aten.unsqueeze.default, aten.reshape.default)):
            continue
        weight, stored = _permuted(pick[0])
        return Projection(rows.args[0], weight, None, turned ^ permuted ^ stored), read_ids(pick[1])
    return None


def _permuted(node: Any) -> tuple[fx.Node, bool]:
    """``(source, True)`` of a node whose last two of three dims are swapped, else ``(node, False)``."""
    if is_call(node, (aten.permute.default,)) and list(node.args[1]) == [0, 2, 1]:
        return node.args[0], True
    return node, False


def _untransposed(matrices: fx.Node) -> tuple[fx.Node, bool]:
    weight, permuted = _permuted(matrices)
    return weight, not permuted
