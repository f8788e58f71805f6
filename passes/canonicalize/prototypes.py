"""Tensors of one number that are made like another tensor: they read no value of it, and need not keep it."""

from __future__ import annotations

import torch
from torch import fx

from regraft.ir.nodes import Builder, dtype, is_call, is_tensor, is_view, rank, tensor_value
from regraft.ir.pointwise import is_pointwise
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_NEW = {
    aten.zeros_like.default: aten.new_zeros.default,
    aten.ones_like.default: aten.new_ones.default,
    aten.full_like.default: aten.new_full.default,
}


@identity(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def made_like_what_is_there_first(node: fx.Node, build: Builder) -> fx.Node | None:
    """Type and device are all that is read of another tensor, and what that was made of has them too."""
    like = node.args[0]
    assert isinstance(like, fx.Node)
    first = _first_alike(like)
    return None if first is like else build.call(node.target, first, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]


@identity(*_NEW)
def made_in_the_shape_of_a_product(node: fx.Node, build: Builder) -> fx.Node | None:
    """A mask in the shape of scores needs no scores."""
    like = node.args[0]
    assert isinstance(like, fx.Node)
    if not _is_product(like) or node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    given = {name: value for name, value in node.kwargs.items() if name != "memory_format"}
    sizes = [build.size(like, dim) for dim in range(rank(like))]
    return build.call(_NEW[node.target], _first_alike(like), sizes, *node.args[1:], **given)  # type: ignore[index]


def _first_alike(node: fx.Node) -> fx.Node:
    """What ``node`` was made of in the end, as long as type and device are the same."""
    source = _source(node)
    while source is not None and _kind(source) == _kind(node):
        node, source = source, _source(source)
    return node


def _is_product(node: fx.Node) -> bool:
    """Whether ``node`` is a product of matrices, or a map or view of one."""
    reached: fx.Node | None = node
    while reached is not None and (is_pointwise(reached) or is_view(reached)):
        reached = _source(reached)
    return is_call(reached, _PRODUCTS)


def _source(node: fx.Node) -> fx.Node | None:
    """The first operand of a call, where that is a tensor."""
    first = node.args[0] if node.op == "call_function" and node.args else None
    return first if isinstance(first, fx.Node) and is_tensor(first) else None


def _kind(node: fx.Node) -> tuple[torch.dtype, torch.device]:
    return dtype(node), tensor_value(node).device


SPELLINGS = (made_like_what_is_there_first, made_in_the_shape_of_a_product)
