"""``regraft::steer``: the states of tokens turned towards directions, their length kept.

In-context vectors (Liu et al., arXiv:2311.06668): with ``u = x / |x|`` and ``y = mean_v strength * (1 + max(0,
cos(x, -c_v))) * c_v / |c_v|``, the result is ``|x| * (u + y) / |u + y|``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register


def reference(x: Tensor, directions: Tensor, strength: float) -> Tensor:
    """The definition. ``x`` ``[…, width]``, ``directions`` ``[vectors, width]``. Computed in fp32 or wider; the result
    has ``x``'s element type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    towards = F.normalize(directions.to(wide.dtype), dim=-1)
    unit = F.normalize(wide, dim=-1)
    opposed = (-(unit @ towards.mT)).clamp(min=0.0)
    turned = unit + strength * ((1 + opposed) @ towards) / directions.shape[0]
    out: Tensor = F.normalize(turned, dim=-1) * wide.norm(dim=-1, keepdim=True)
    return out.to(x.dtype)


def _fake(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


steer = register(
    "steer", "(Tensor x, Tensor directions, float strength) -> Tensor", reference, _fake, elementwise(12.0)
)
