"""Last changes to a lowered graph: views of views become one, dead temporaries are written over."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Call -> (place of the operand that may be written over, the call that does so).
_WRITE_OVER: dict[Any, tuple[int, Any]] = {
    aten.addmm.default: (0, aten.addmm_.default),
    aten.add.Tensor: (0, aten.add_.Tensor),
    aten.mul.Tensor: (0, aten.mul_.Tensor),
}

#: Calls that write over a buffer which nothing else reads any more: from there on it is theirs.
_OWNING = frozenset(target for _, target in _WRITE_OVER.values())
#: Views whose elements may share memory: nothing can be written to them.
_OVERLAPPING = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.unfold.default)


def polish(graph: fx.Graph) -> None:
    """Apply all of them, in order."""
    merge_reshapes(graph)
    fold_views(graph)
    graph.eliminate_dead_code()
    write_over_dead(graph)
    graph.lint()


def merge_reshapes(graph: fx.Graph) -> None:
    """A reshape of a reshape needs only the outer one."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not aten.reshape.default:
            continue
        source = node.args[0]
        while isinstance(source, fx.Node) and source.target is aten.reshape.default:
            source = source.args[0]
        node.args = (source, *node.args[1:])


_VIEWS = (
    aten.reshape.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
)


def fold_views(graph: fx.Graph) -> None:
    """A chain of views of a dense buffer is one ``as_strided``: its strides are worked out here, not in every call."""
    layouts: dict[fx.Node, tuple[fx.Node, torch.Tensor, int]] = {}  # view -> (buffer, a meta view of it, views so far)
    for node in list(graph.nodes):
        if node.meta.get("dense"):
            layouts[node] = (node, node.meta["val"], 0)
        if node.op != "call_function" or node.target not in _VIEWS or node.args[0] not in layouts:
            continue
        base, view, depth = layouts[node.args[0]]
        moved = _moved(node, view)
        if moved is None:
            continue
        layouts[node] = (base, moved, depth + 1)
        if depth >= 1 and any(user.target not in _VIEWS for user in node.users):
            with graph.inserting_before(node):
                place = (base, list(moved.shape), list(moved.stride()), moved.storage_offset())
                direct = graph.call_function(aten.as_strided.default, place)
            direct.meta = dict(node.meta)
            node.replace_all_uses_with(direct, propagate_meta=False)
            layouts[direct] = layouts[node]


def _moved(node: fx.Node, view: torch.Tensor) -> torch.Tensor | None:
    """The view of the meta tensor that a call makes of it; None when it copies, or its arguments are computed."""
    if any(isinstance(arg, fx.Node) for arg in fx.node.map_aggregate(node.args[1:], lambda x: x)):
        return None
    try:
        moved: torch.Tensor = node.target(view, *node.args[1:])  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return None
    same = moved.untyped_storage()._cdata == view.untyped_storage()._cdata
    return moved if same else None


def write_over_dead(graph: fx.Graph) -> None:
    """A call that could write over an operand does so when that operand's buffer is not read any more.

    The operand must be a whole buffer that a call allocated (not an input, not a weight) of the result's shape, and
    every reader of it, through views too, must come before the call.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _WRITE_OVER:
            continue
        position, target = _WRITE_OVER[node.target]
        operand = node.args[position]
        if isinstance(operand, fx.Node) and _is_dead_buffer(operand, node, place) and _same_form(node, operand):
            node.target = target


def _same_form(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the operand has the result's shape and type. Epilogues of linear layers do by construction."""
    here, there = _fake(node), _fake(operand)
    if node.target is aten.addmm.default:
        return there is None or there.dim() > 1  # a bias is one row, not a whole buffer
    return here is not None and there is not None and here.shape == there.shape and here.dtype == there.dtype


def _fake(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _is_dead_buffer(operand: fx.Node, reader: fx.Node, place: dict[fx.Node, int]) -> bool:
    *views, base = _views(operand)
    if not _allocates(base) or any(view.target in _OVERLAPPING for view in views):
        return False
    pending, seen = [base], set[fx.Node]()
    while pending:
        for user in pending.pop().users:
            if user in seen or user is reader:
                continue
            seen.add(user)
            if user.op == "output" or place[user] > place[reader]:
                return False
            if _may_alias(user):
                pending.append(user)
    return sum(1 for source in reader.all_input_nodes if _base(source) is base) == 1


def _base(node: fx.Node) -> fx.Node:
    """The call that made the memory that ``node`` is a view of."""
    return _views(node)[-1]


def _views(node: fx.Node) -> list[fx.Node]:
    """``node``, what it is a view of, and so on, down to the call that made the memory."""
    chain = [node]
    while isinstance(node.target, torch._ops.OpOverload) and _may_alias(node) and node.target not in _OWNING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
        chain.append(node)
    return chain


def _allocates(node: fx.Node) -> bool:
    """Whether a call returns one new buffer: an operator whose schema says that its result aliases nothing, or one
    that took a buffer over."""
    if node.target in _OWNING:
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return len(node.target._schema.returns) == 1 and not _may_alias(node)


def _may_alias(node: fx.Node) -> bool:
    """Whether a call may return memory of an operand; Python functions are taken to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    return any(result.alias_info is not None for result in node.target._schema.returns)
