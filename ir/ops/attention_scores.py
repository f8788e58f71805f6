"""The scores that all definitions of attention share: scale, softcap, bias and slopes, in this order."""

from __future__ import annotations

import torch
from torch import Tensor


def scores_of(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    first_row: int = 0,
    first_key: int = 0,
) -> Tensor:
    """``softcap(scale * q k^T) + bias + slopes * (key - query)``, ``[batch, heads, rows, keys]`` in ``key``'s type.

    ``query`` ``[batch, heads, rows, head_dim]``, ``key`` ``[batch, heads, keys, head_dim]``; ``bias`` broadcasts to the
    result. They may be a part of a larger whole, which begins at ``first_row`` and ``first_key``.
    """
    scores = query.to(key.dtype) @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        rows, keys = scores.shape[-2:]
        places = torch.arange(first_row, first_row + rows, device=query.device)[:, None]
        distance = torch.arange(first_key, first_key + keys, device=query.device) - places
        scores = scores + slopes.to(key.dtype)[:, None, None] * distance
    return scores


def of_rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows of what broadcasts to ``[batch, heads, length, keys]``."""
    return tensor if tensor is None or tensor.dim() < 2 or tensor.shape[-2] == 1 else tensor[..., rows, :]
