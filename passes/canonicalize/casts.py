"""Casts and copies: what changes no value is dropped, every remaining cast is ``aten.to.dtype(x, dtype)``."""

from __future__ import annotations

import torch
from torch import fx

from regraft.ir.nodes import Builder, dtype, shape, sizes_equal
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten

#: Operators whose result depends on the strides of their input: a copy in front of them stays.
_STRIDE_SENSITIVE = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype)


@identity(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def cast_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """Every cast is to.dtype; one that keeps type and device is dropped."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if x.meta["val"].device != node.meta["val"].device:
        return None
    if dtype(x) == dtype(node):
        return _drop(node, x)
    wanted = (x, dtype(node))
    if node.target is aten.to.dtype and node.args == wanted and not node.kwargs:
        return None
    return build.call(aten.to.dtype, *wanted)


@identity(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)
def copy_is_nothing(node: fx.Node, build: Builder) -> fx.Node | None:
    """In a pure graph a copy is its source, unless strides matter or an input itself would be returned."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return _drop(node, x)


@identity(aten.dropout.default, aten.native_dropout.default, aten.feature_dropout.default, aten.clone.default)
def dropout_in_eval(node: fx.Node, build: Builder) -> fx.Node | None:
    """Dropout outside of training, or with probability zero, is its input; decomposed it is a copy in the same order of
    memory, which makes no view legal."""
    if node.target is aten.clone.default:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        same = sizes_equal(x.meta["val"].stride(), node.meta["val"].stride())
        return _drop(node, x) if same else None
    x, probability, train = node.args
    return x if isinstance(x, fx.Node) and (not train or probability == 0) else None


def _drop(node: fx.Node, x: fx.Node) -> fx.Node | None:
    if not sizes_equal(shape(node), shape(x)):
        return None
    if any(user.op == "output" for user in node.users) and x.op == "placeholder":
        return None
    return None if _feeds_strides(node) else x


def _feeds_strides(node: fx.Node) -> bool:
    pending, seen = list(node.users), set[fx.Node]()
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in _STRIDE_SENSITIVE:
            return True
        if user.target in (aten.view.default, aten.reshape.default):
            pending += user.users
    return False


SPELLINGS = (cast_spelling, copy_is_nothing, dropout_in_eval)
