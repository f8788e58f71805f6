"""``regraft::rms_norm``: root mean square normalisation over the last dimension.

``y = x / sqrt(mean(x**2) + eps) * (weight + offset)`` (Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019). Flavours in use differ numerically in low precision: ``cast="before_weight"`` rounds the normalised value to
the input's type before the weight is applied (Llama), ``"after_weight"`` applies the weight in fp32 (Gemma, OLMo 2).
``offset`` is 1 where the stored weight is a difference from one (Gemma).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> Tensor:
    """The definition. ``x`` is ``[..., hidden]``, ``weight`` ``[hidden]`` or None; the result has ``x``'s type, or
    the promotion of ``x`` and ``weight`` where the weight is applied after the cast."""
    wide = torch.promote_types(x.dtype, torch.float32)
    raised = x.to(wide)
    normed = raised * torch.rsqrt(raised.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast == "before_weight":
        scale = weight if offset == 0 else weight + offset
        return normed.to(x.dtype) * scale
    scale = weight.to(wide) if offset == 0 else weight.to(wide) + offset
    return (normed * scale).to(x.dtype)


def _fake(x: Tensor, weight: Tensor | None, cast: str, **_: Any) -> Tensor:
    dtype = x.dtype
    if weight is not None and cast == "before_weight":
        dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


rms_norm = register(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, float offset=0.0, str cast='before_weight') -> Tensor",
    reference,
    _fake,
    elementwise(5),
)
