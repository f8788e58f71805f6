"""Some rows of what a call computes, from as many rows of its operands.

``rows_of`` knows the operators of which each row needs the same row of an operand alone, or, as attention does of its
queries, nothing else of one operand. The others give None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.pointwise import is_pointwise
from regraft.passes.fuse.cut import Cut
from regraft.passes.fuse.queries import attention_of_rows

aten = torch.ops.aten


def rows_of(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    """The rows of ``node``, computed from fewer rows of its operands; None where that is not known to be the same."""
    if is_pointwise(node) or is_call(node, (ops.glu,)):
        return _of_broadcast(node, cut, build)
    handler = _HANDLERS.get(node.target)
    return None if handler is None else handler(node, cut, build)


def _of_broadcast(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    """Operands that broadcast to the result: the rows of those that have them."""
    back = cut.dim - rank(node)
    having = [
        operand
        for operand in node.all_input_nodes
        if is_tensor(operand) and rank(operand) >= -back and not size_equal(shape(operand)[back], 1)
    ]
    if not having or not all(size_equal(shape(operand)[back], shape(node)[cut.dim]) for operand in having):
        return None
    made = {operand: cut.of(operand, build, back) for operand in having}
    args, kwargs = (fx.map_arg(given, lambda n: made.get(n, n)) for given in (node.args, node.kwargs))
    return build.call(node.target, *args, **kwargs)  # type: ignore[arg-type]


def _of_last_dims(first: str, sizes: str = "") -> Callable[[fx.Node, Cut, Builder], fx.Node | None]:
    """An operator that reads the last dim of its operand ``first``, or as many as its argument ``sizes`` says."""

    def handler(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
        read = len(arguments(node)[sizes]) if sizes else 1
        return _with(node, first, cut, build) if cut.dim < rank(node) - read else None

    return handler


def _with(node: fx.Node, name: str, cut: Cut, build: Builder, dim: int | None = None) -> fx.Node:
    """The same call on the rows of one operand."""
    given = arguments(node)
    rows, place = cut.of(given[name], build, dim), list(given).index(name)
    if place >= len(node.args):
        return build.call(node.target, *node.args, **{**node.kwargs, name: rows})  # type: ignore[arg-type]
    args = (*node.args[:place], rows, *node.args[place + 1 :])
    return build.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type]


def _of_rotation(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    return _of_broadcast(node, cut, build) if cut.dim < rank(node) - 1 else None


def _of_softmax(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    return None if arguments(node)["dim"] % rank(node) == cut.dim else _with(node, "self", cut, build)


def _of_permutation(node: fx.Node, cut: Cut, build: Builder) -> fx.Node:
    return _with(node, "self", cut, build, arguments(node)["dims"][cut.dim])


def _of_reshape(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    """Dims in front of the cut stay as they are, or those behind it, and so does the cut one."""
    x, sizes = node.args[0], list(arguments(node)["shape"])
    assert isinstance(x, fx.Node)
    old, new, back = shape(x), shape(node), cut.dim - rank(node)
    fronts, ends = (old[: cut.dim + 1], new[: cut.dim + 1]), (old[back:], new[back:])
    front, end = (len(left) == len(right) and all(map(size_equal, left, right)) for left, right in (fronts, ends))
    if not front and not end:
        return None
    sizes[cut.dim] = cut.length
    return build.call(aten.reshape.default, cut.of(x, build, cut.dim if front else back), sizes)


def _of_merged(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    """Tokens behind a reduction: those that it protects in front are what they were."""
    merged, place = node.args
    if not is_call(merged, (ops.merge_tokens,)) or place != 0 or cut.dim != 1:
        return None
    given = arguments(merged)  # type: ignore[arg-type]
    kept: Any = given["kept"]
    plan: Any = kept.args[0] if is_call(kept, (operator.getitem,)) else None
    if not is_call(plan, (ops.plan_merge,)) or kept.args[1] != 0:
        return None
    inside = cut.start >= 0 and cut.start + cut.length <= arguments(plan)["prefix"]
    return cut.of(given["x"], build) if inside else None


_HANDLERS: dict[Any, Callable[[fx.Node, Cut, Builder], fx.Node | None]] = {
    aten.linear.default: _of_last_dims("input"),
    aten.embedding.default: _of_last_dims("indices"),
    aten.layer_norm.default: _of_last_dims("input", "normalized_shape"),
    ops.rms_norm: _of_last_dims("x"),
    ops.rope: _of_rotation,
    aten.softmax.int: _of_softmax,
    aten.permute.default: _of_permutation,
    aten.reshape.default: _of_reshape,
    ops.attention: attention_of_rows,
    operator.getitem: _of_merged,
}
