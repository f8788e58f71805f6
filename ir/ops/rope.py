"""``regraft::rope``: rotary position embedding (Su et al., "RoFormer", 2021).

The first ``rotary_dim`` entries of the last dimension are rotated by position, the others pass through. ``layout``
says which entries form a pair: "half" pairs ``i`` with ``i + rotary_dim/2`` (GPT-NeoX, Llama), "interleaved" pairs
``2i`` with ``2i + 1`` (GPT-J, Cohere). "interleaved_to_half" reads pairs interleaved and writes them in halves
(DeepSeek).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register

LAYOUTS = ("half", "interleaved", "interleaved_to_half")


def reference(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, layout: str) -> Tensor:
    """The definition.

    ``x`` is ``[..., length, head_dim]``; ``cos`` and ``sin`` broadcast to ``[..., length, rotary_dim]`` or hold one
    value a pair, ``[..., length, rotary_dim / 2]``. The result has the promoted element type of all three.
    """
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if layout == "interleaved_to_half":
        rotated = torch.cat((rotated[..., 0::2], rotated[..., 1::2]), dim=-1)
        layout = "half"
    if layout == "half":
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    elif layout == "interleaved":
        turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
    else:
        raise ValueError(f"unknown rope layout {layout!r}; known: {', '.join(LAYOUTS)}")
    out = rotated * widen(cos, rotary_dim, layout) + turned * widen(sin, rotary_dim, layout)
    return torch.cat((out, passed.to(out.dtype)), dim=-1) if passed.shape[-1] else out


def widen(table: Tensor, rotary_dim: int, layout: str) -> Tensor:
    """The table at full width ``rotary_dim``, from one value a pair if need be."""
    if table.shape[-1] == rotary_dim:
        return table
    if layout == "half":
        return torch.cat((table, table), dim=-1)
    return table.repeat_interleave(2, dim=-1)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
    leading = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1], sin.shape[:-1])
    return torch.empty((*leading, x.shape[-1]), dtype=dtype, device=x.device)


rope = register(
    "rope",
    "(Tensor x, Tensor cos, Tensor sin, SymInt rotary_dim, str layout='half') -> Tensor",
    reference,
    _fake,
    elementwise(4),
)
