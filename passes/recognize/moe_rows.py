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
from regraft.passes.recognize.moe_experts import Refused, float_source

aten = torch.ops.aten

BLANK = (aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default, aten.empty.memory_format)
ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)
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
        return order if plain and is_call(blank, BLANK) and _counts_up(values, inverse) else None
    if is_call(inverse, (aten.scatter.src,)):
        blank, _, permutation, values = inverse.args
        return order_of(permutation) if is_call(blank, BLANK) and _counts_up(values, inverse) else None
    again = order_of(inverse)
    return order_of(again.args[0]) if again is not None and not _descending(again) else None


def _counts_up(node: Any, like: fx.Node) -> bool:
    if not is_call(node, (aten.arange.default, aten.arange.start, aten.arange.start_step)):
        return False
    given = arguments(node)
    return given.get("start", 0) == 0 and given.get("step", 1) == 1 and size_equal(shape(node)[0], shape(like)[0])


def counts_rows(node: fx.Node, index: fx.Node) -> bool:
    """Whether a tensor ``[rows, 1]`` holds the number of each row of ``index``."""
    source: Any = node
    while is_call(source, (aten.unsqueeze.default, aten.reshape.default)):
        source = source.args[0]
    return rank(node) == 2 and size_equal(shape(node)[1], 1) and _counts_up(source, index)


def _descending(order: fx.Node) -> bool:
    return bool(arguments(order).get("descending", False))


def distinct(index: Any) -> bool:
    """Whether no token names an expert twice: a ``scatter`` keeps one of two, a sum both."""
    while is_call(index, (aten.slice.Tensor, aten.unsqueeze.default, aten.to.dtype)):
        index = index.args[0]
    if is_call(index, (operator.getitem,)) and index.args[1] == 1:
        index = index.args[0]
        found = is_call(index, (aten.topk.default, aten.max.dim, *_SORTS))
    else:
        found = is_call(index, (aten.argmax.default, aten.argsort.default, aten.argsort.stable))
    return found and arguments(index)["dim"] in (-1, rank(index.args[0]) - 1)


def picked(node: Any) -> tuple[fx.Node, Any] | None:
    """``(table, rows)`` of a node that picks entries of the first dimension of ``table``."""
    if is_call(node, (aten.index.Tensor,)) and len(node.args[1]) == 1:
        return node.args[0], node.args[1][0]
    if is_call(node, (aten.index_select.default,)) and node.args[1] in (0, -rank(node.args[0])):
        return node.args[0], node.args[2]
    return None


@dataclass(frozen=True)
class Ids:
    """Expert ids of some rows: ``flat`` in the source order, of any shape, and the order that the rows are in.

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
    """Expert ids, sorted or not; reshapes and casts between integers and to float (for ``histc``) are looked
    through."""
    while is_call(node, (aten.to.dtype,)) and dtype(node) in (*_INTEGERS, torch.float32, torch.float64):
        node = node.args[0]
    if is_call(node, (operator.getitem,)) and node.args[1] == 0 and is_call(node.args[0], _SORTS):
        return Ids(read_ids(node.args[0].args[0]).flat, node.args[0])
    pick = picked(node)
    order = order_of(pick[1]) if pick is not None else None
    if pick is not None and order is not None:
        return Ids(read_ids(pick[0]).flat, order)
    while is_call(node, (aten.reshape.default,)):  # which keeps the order of the elements
        node = node.args[0]
    return Ids(node, None)


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


def counted_ids(counts: Any, experts: Any) -> fx.Node | None:
    """The expert ids that ``counts [experts]`` says the number of for each expert; None for any other node."""
    counts = _uncast(counts)
    given = arguments(counts) if isinstance(counts, fx.Node) and counts.op == "call_function" else {}
    if is_call(counts, (aten.histc.default,)):
        whole = (given["bins"], given["min"], given["max"]) == (experts, 0, experts - 1)
        return read_ids(given["self"]).flat if whole else None
    if is_call(counts, (aten.bincount.default,)) and given["weights"] is None and given["minlength"] == experts:
        return read_ids(given["self"]).flat
    if is_call(counts, (aten.sum.dim_IntList,)) and rank(counts) == 1 and not given["keepdim"]:
        return _marked_ids(_uncast(given["self"]))
    return None


def _marked_ids(table: Any) -> fx.Node | None:
    """The ids behind a table with a one for each: one-hot rows, or ones scattered to a row's distinct experts."""
    if is_call(table, (aten.one_hot.default,)):
        return read_ids(table.args[0]).flat
    if not is_call(table, (aten.scatter.value,)):
        return None
    blank, dim, index, value = table.args
    marked = is_call(blank, ZEROS) and value == 1 and dim in (1, -1) and rank(table) == 2
    return read_ids(index).flat if marked and distinct(index) else None


def _uncast(node: Any) -> Any:
    while is_call(node, (aten.to.dtype,)):
        node = node.args[0]
    return node
