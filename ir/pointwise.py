"""Which calls work element by element."""

from __future__ import annotations

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import is_call, is_random

aten = torch.ops.aten

_CASTS = frozenset(
    (
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    )
)
#: Pointwise too, though PyTorch does not say so.
_POINTWISE = frozenset(
    (
        aten.hardswish.default,
        aten.where.Scalar,
        aten.where.ScalarSelf,
        aten.where.ScalarOther,
        aten.rsub.Scalar,
        aten.rsub.Tensor,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        ops.activation,
    )
)


def is_cast(node: fx.Node) -> bool:
    """Whether the call changes no more than element type, device or memory."""
    return is_call(node, _CASTS)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the same element of the operands alone."""
    if is_cast(node) or is_call(node, _POINTWISE):
        return True
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags and not is_random(node)
