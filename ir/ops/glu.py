"""``regraft::glu``: a gated linear unit's product, ``activation(gate) * up`` (Shazeer, "GLU Variants", 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.ir.ops.activation import activate
from regraft.ir.ops.registry import elementwise, register


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The definition; both inputs are ``[..., intermediate]``."""
    return activate(gate, activation) * up


@torch.library.custom_op("regraft::glu", mutates_args=(), schema="(Tensor gate, Tensor up, str activation) -> Tensor")
def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return reference(gate, up, activation)


@_glu.register_fake
def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    shape = torch.broadcast_shapes(gate.shape, up.shape)
    return torch.empty(shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


glu = register("glu", _glu, reference, elementwise(6))
