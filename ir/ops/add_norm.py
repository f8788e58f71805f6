"""``regraft::add_norm``: the residual stream's sum and its norm, one read of memory for both.

``total = x + residual``, ``normed = norm(total)`` with ``kind`` "rms_norm" (flavours as in ``regraft::rms_norm``) or
"layer_norm".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register
from regraft.ir.ops.rms_norm import reference as rms_norm_reference


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    offset: float,
    cast: str,
) -> tuple[Tensor, Tensor]:
    """The definition; ``x`` and ``residual`` are ``[..., hidden]``. Returns ``(normed, total)``."""
    total = x + residual
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total
    return rms_norm_reference(total, weight, eps, offset, cast), total


def _fake(x: Tensor, residual: Tensor, weight: Tensor | None, kind: str, cast: str, **_: Any) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual, memory_format=torch.contiguous_format)
    dtype = total.dtype
    if kind == "rms_norm" and weight is not None and cast == "before_weight":
        dtype = torch.promote_types(dtype, weight.dtype)
    return torch.empty(total.shape, dtype=dtype, device=x.device), total


add_norm = register(
    "add_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str kind='rms_norm', "
    "float offset=0.0, str cast='before_weight') -> (Tensor, Tensor)",
    reference,
    _fake,
    elementwise(6),
)
