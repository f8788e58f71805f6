"""Tables ``[..., experts]`` of what a router gives each expert: which experts they name, and with which weights.

A table names the experts of an index ``[..., top_k]`` where all its other entries are zero for sure. An index of the
dims ``[...]`` alone names one expert.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.passes.recognize.moe_rows import ZEROS, counts_rows, distinct

aten = torch.ops.aten

_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)
_SCATTERS = (aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
#: Operators that leave a zero a zero: of one tensor, or of a tensor and a divisor.
_KEEPING = (aten.to.dtype, aten.relu.default, aten.clone.default, aten.div.Tensor, aten.neg.default)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
#: What a router adds to logits for "never": a softmax makes zero of it whatever the other logits are.
_NEVER = -1e9


def weighted_index(table: Any) -> tuple[fx.Node, fx.Node] | None:
    """``(index, weight)`` of a table that was made of a weight for each entry of the index; None for any other."""
    table = _uncast(table)
    if is_call(table, (aten.scatter.src, aten.scatter_add.default)):
        blank, dim, index, weight = table.args
        if is_call(blank, ZEROS) and _is_last(dim, table) and distinct(index) and sizes_equal(*_sizes(index, weight)):
            return index, weight
    if is_call(table, (aten.index_put.default,)) and len(table.args[1]) == 2 and is_call(table.args[0], ZEROS):
        (rows, index), weight = table.args[1], table.args[2]
        fits = is_tensor(index) and rank(index) == 2 and sizes_equal(*_sizes(index, weight))
        return (index, weight) if fits and counts_rows(rows, index) and distinct(index) else None
    if is_call(table, (aten.sum.dim_IntList,)) and list(table.args[1]) == [-2]:
        for hot, weight in _factors(table.args[0]):
            if is_call(hot, (aten.one_hot.default,)) and is_call(weight, (aten.unsqueeze.default,)):
                return hot.args[0], weight.args[0]
    return None


def top_k_of(index: fx.Node, tokens: Sequence[Any]) -> int | None:
    """How many experts an index names for each of the tokens that have these dims, flattened or not; None where it is
    no index of them."""
    sizes, count = shape(index), math.prod(tokens)
    if size_equal(math.prod(sizes), count):
        return 1
    whole = bool(sizes) and isinstance(sizes[-1], int) and size_equal(math.prod(sizes[:-1]), count)
    return int(sizes[-1]) if whole else None


def named_index(table: Any) -> fx.Node | None:
    """The index outside of which all entries of a table are zero; None where there is none for sure."""
    table = _uncast(table)
    if is_call(table, _SCATTERS):
        blank, dim, index = table.args[:3]
        return index if is_call(blank, ZEROS) and _is_last(dim, table) and distinct(index) else None
    if is_call(table, (aten.one_hot.default,)):
        return cast(fx.Node, table.args[0])
    if is_call(table, (aten.sum.dim_IntList,)) and list(table.args[1]) == [-2]:
        hot = next((hot for hot, _ in _factors(table.args[0]) if is_call(hot, (aten.one_hot.default,))), None)
        hot = hot or _uncast(table.args[0])
        return hot.args[0] if is_call(hot, (aten.one_hot.default,)) and distinct(hot.args[0]) else None
    if is_call(table, (aten.softmax.int,)) and _is_last(table.args[1], table):
        return _hidden_but(table.args[0])
    if is_call(table, (aten.sigmoid.default, aten.exp.default)):
        return _hidden_but(table.args[0])
    if is_call(table, (aten.reshape.default,)) and size_equal(shape(table)[-1], shape(table.args[0])[-1]):
        return named_index(table.args[0])  # the dims of the tokens are flattened, or parted
    if is_call(table, WHERE):
        return _kept_by_where(table, 0)
    if is_call(table, (aten.mul.Tensor,)):
        whole = (factor for factor, _ in _factors(table) if sizes_equal(shape(factor), shape(table)))
        return next((index for index in map(named_index, whole) if index is not None), None)
    return named_index(table.args[0]) if is_call(table, _KEEPING) and is_tensor(table.args[0]) else None


def named_by_mask(mask: Any) -> tuple[fx.Node, bool] | None:
    """``(index, inside)``: a table of truth values that are true inside of the index, or outside of it."""
    mask = _uncast(mask)
    if is_call(mask, (aten.scatter.value,)):
        blank, dim, index, value = mask.args
        inside = is_call(blank, ZEROS) and value == 1
        outside = is_call(blank, _ONES) and not value
        return (index, inside) if (inside or outside) and _is_last(dim, mask) and distinct(index) else None
    if is_call(mask, (aten.one_hot.default,)):
        return mask.args[0], True
    if is_call(mask, (aten.sum.dim_IntList, aten.any.dim)):
        hot, dims = _uncast(mask.args[0]), mask.args[1]
        whole = is_call(hot, (aten.one_hot.default,)) and (dims if isinstance(dims, list) else [dims]) == [-2]
        return (hot.args[0], True) if whole and distinct(hot.args[0]) else None
    if is_call(mask, (aten.bitwise_not.default, aten.logical_not.default)):
        return _turned(named_by_mask(mask.args[0]))
    if is_call(mask, (aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar)):
        found = named_by_mask(mask.args[0])
        number, equal = mask.args[1], mask.target is aten.eq.Scalar
        if found is None or not found[1] or number not in ((0, 1) if equal else (0,)):
            return None
        return _turned(found) if equal and number == 0 else found
    return None


Named = tuple[fx.Node, int]


def named_place(mask: Any) -> Named | None:
    """``(index, expert)`` of ``index == expert``, entry by entry, or of an entry of its one-hot form."""
    mask = _uncast(mask)
    if is_call(mask, (aten.eq.Scalar,)) and isinstance(mask.args[1], int):
        return mask.args[0], mask.args[1]
    if is_call(mask, (aten.select.int,)) and mask.args[1] == -1 and is_call(mask.args[0], (aten.one_hot.default,)):
        return mask.args[0].args[0], mask.args[2]
    return None


def named_tokens(mask: Any) -> Named | None:
    """``(index, expert)`` of a mask that is true for the tokens that chose an expert, whichever place it has."""
    mask = _uncast(mask)
    if is_call(mask, (aten.reshape.default,)) and not size_equal(shape(mask.args[0])[-1], 1):
        return named_tokens(mask.args[0])
    if is_call(mask, (aten.any.dim, aten.sum.dim_IntList)):
        dims = mask.args[1]
        found = named_place(mask.args[0]) if dims in (-1, [-1], rank(mask.args[0]) - 1) else None
        return found if found is not None and distinct(found[0]) else None
    if is_call(mask, (aten.gt.Scalar, aten.ne.Scalar)) and mask.args[1] == 0:
        return named_tokens(mask.args[0]) if _is_count(mask.args[0]) else None
    entry = named_entry(mask)
    if entry is not None:
        found_index = named_by_mask(entry[0])
        if found_index is not None and found_index[1]:
            return found_index[0], entry[1]
    return named_place(mask)


def _is_count(node: Any) -> bool:
    """Whether a node is one where :func:`named_tokens` reads a true, and zero elsewhere."""
    entry = named_entry(node)
    found = None if entry is None else named_by_mask(entry[0])
    return is_call(node, (aten.sum.dim_IntList,)) or (found is not None and found[1])


def weighted_tokens(mask: Any) -> tuple[fx.Node, int, fx.Node] | None:
    """``(index, expert, table)`` of a mask of the tokens that a table gives the expert a weight other than zero: some
    that the index names may be left out, whose weight in this table is zero."""
    mask = _uncast(mask)
    if not is_call(mask, (aten.gt.Scalar, aten.ne.Scalar)) or mask.args[1] != 0:
        return None
    entry = named_entry(mask.args[0])
    if entry is None or not (mask.target is aten.ne.Scalar or never_negative(entry[0])):
        return None
    found = weighted_index(entry[0])
    index = found[0] if found is not None else named_index(entry[0])
    return None if index is None else (index, entry[1], entry[0])


def named_entry(node: Any) -> Named | None:
    """``(table, column)`` of a column of a table, or of a row of a turned one."""
    given = arguments(node) if isinstance(node, fx.Node) and node.op == "call_function" else {}
    if is_call(node, (aten.select.int,)):
        table, dim, number = given["self"], given["dim"], given["index"]
        if is_call(table, (aten.permute.default,)) and list(arguments(table)["dims"]) == [1, 0]:
            table, dim = table.args[0], -3 - dim
        return (table, number) if dim == -1 and isinstance(number, int) else None
    if is_call(node, (aten.slice.Tensor,)) and given["dim"] == -1 and given["end"] == (given["start"] or 0) + 1:
        return given["self"], given["start"] or 0
    return None


def never_negative(node: Any) -> bool:
    """Whether no entry is below zero for sure."""
    if is_call(node, (aten.softmax.int, aten.sigmoid.default, aten.relu.default, aten.one_hot.default)):
        return True
    if is_call(node, (aten.scatter.src,)):
        return is_call(node.args[0], ZEROS) and never_negative(node.args[3])
    if is_call(node, (operator.getitem,)) and node.args[1] == 0:
        return never_negative(node.args[0].args[0])
    if is_call(node, (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor)):
        return all(never_negative(side) if is_tensor(side) else side >= 0 for side in node.args[:2])
    if is_call(node, (aten.scatter.value,)):
        return is_call(node.args[0], ZEROS) and node.args[3] >= 0
    moves = (aten.to.dtype, aten.sum.dim_IntList, aten.unsqueeze.default, aten.reshape.default, aten.gather.default)
    return is_call(node, moves) and never_negative(node.args[0])


def _turned(found: tuple[fx.Node, bool] | None) -> tuple[fx.Node, bool] | None:
    return None if found is None else (found[0], not found[1])


def _hidden_but(logits: Any) -> fx.Node | None:
    """The index outside of which logits are hidden from a softmax."""
    logits = _uncast(logits)
    if is_call(logits, (aten.scatter.src,)):
        blank, dim, index = logits.args[:3]
        hidden = is_call(blank, _FULL) and _is_never(_filled(blank))
        return index if hidden and _is_last(dim, logits) and distinct(index) else None
    return _kept_by_where(logits, _NEVER) if is_call(logits, WHERE) else None


def _filled(full: fx.Node) -> Any:
    return arguments(full)["fill_value"]


def _kept_by_where(node: fx.Node, other: float) -> fx.Node | None:
    """The index where a ``where`` lets a value through, and puts ``other`` (or less, where that hides) elsewhere."""
    mask, inside, outside = node.args[:3]
    found = named_by_mask(mask)
    fills = _is_zero if other == 0 else _is_never
    if found is None or not fills(outside if found[1] else inside):
        return None
    return found[0]


def _is_zero(value: Any) -> bool:
    return is_call(value, ZEROS) or _number(value) == 0


def _is_never(value: Any) -> bool:
    number = _number(value)
    return number is not None and (number == -math.inf or number <= _NEVER)


def _number(value: Any) -> float | None:
    if is_call(value, _FULL) or is_call(value, (aten.scalar_tensor.default,)):
        value = arguments(value).get("fill_value", value.args[0])
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _factors(node: Any) -> list[tuple[Any, Any]]:
    """Both orders of the factors of a product of two tensors, casts aside."""
    if not is_call(node, (aten.mul.Tensor,)) or not all(is_tensor(factor) for factor in node.args):
        return []
    left, right = (_uncast(factor) for factor in node.args)
    return [(left, right), (right, left)]


def _is_last(dim: Any, node: fx.Node) -> bool:
    return dim in (-1, rank(node) - 1)


def _sizes(*nodes: Any) -> tuple[Any, ...]:
    return tuple(shape(node) for node in nodes)


def _uncast(node: Any) -> Any:
    while is_call(node, (aten.to.dtype,)):
        node = node.args[0]
    return node
