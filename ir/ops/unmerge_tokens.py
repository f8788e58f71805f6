"""``regraft::unmerge_tokens``: every token gets the value of the one that it was merged into."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register


def rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]`` for ``x`` ``[batch, tokens, width]`` and ``index`` ``[batch, n]``."""
    flat = index + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    return x.reshape(-1, x.shape[2]).index_select(0, flat.reshape(-1)).reshape(*index.shape, x.shape[2])


def reference(x: Tensor, slots: Tensor) -> Tensor:
    """The definition. ``x`` is ``[batch, left, width]``, ``slots`` ``[batch, tokens]``; the result is
    ``[batch, tokens, width]``, zero where a token was dropped (slot -1)."""
    return rows(x, slots.clamp(min=0)).masked_fill((slots < 0)[..., None], 0)


def _fake(x: Tensor, slots: Tensor) -> Tensor:
    return torch.empty((*slots.shape, x.shape[2]), dtype=x.dtype, device=x.device)


unmerge_tokens = register("unmerge_tokens", "(Tensor x, Tensor slots) -> Tensor", reference, _fake, elementwise(0))
