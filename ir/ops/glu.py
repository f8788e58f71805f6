"""``regraft::glu``: a gated linear unit's product, ``activation(gate) * up`` (Shazeer, "GLU Variants", 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.activation import activate
from regraft.ir.ops.registry import elementwise, register


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The definition; both inputs are ``[..., intermediate]``."""
    return activate(gate, activation) * up


def _fake(gate: Tensor, up: Tensor, **_: Any) -> Tensor:
    shape = torch.broadcast_shapes(gate.shape, up.shape)
    return torch.empty(shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


glu = register("glu", "(Tensor gate, Tensor up, str activation) -> Tensor", reference, _fake, elementwise(6))
