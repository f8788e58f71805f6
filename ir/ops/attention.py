"""``regraft::attention``: scaled dot-product attention with its mask as a predicate.

``softmax(softcap(scale * q k^T) + bias + slopes * (key - query), masked) v``. The mask is the text of a predicate over
query and key indices (``ir/mask``), with the tensors that it reads beside it, so that a causal or windowed mask is
never a tensor. What happens at masked positions is part of the meaning: ``mask_fill`` None removes them (minus
infinity), a number is what the source wrote there, which matters for rows with no key at all. For such rows with
``mask_fill`` None, ``empty_rows`` is "nan" (softmax of minus infinities) or "zero" (PyTorch's SDPA).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regraft.ir.mask import parse, to_dense
from regraft.ir.ops.attention_scores import (
    SCORE_OPERANDS,
    scores_of,
    softmax_of,
    spread_heads,
    two_products,
    weighed_values,
)
from regraft.ir.ops.registry import register


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    mask: str,
    mask_fill: float | None,
    empty_rows: str,
    softcap: float,
) -> Tensor:
    """The definition.

    ``query`` ``[batch, heads, length, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``, ``value``
    ``[batch, kv_heads, keys, value_dim]`` with ``heads`` a multiple of ``kv_heads``; ``bias`` broadcasts to
    ``[batch, heads, length, keys]``; ``slopes`` (ALiBi) and ``sinks`` (a logit that takes weight and gives nothing)
    are ``[heads]``. Computed in fp32 or wider; the result has ``query``'s element type. A few batches at a time, so
    that not all scores are in memory at once.
    """
    batch, heads, length = query.shape[:3]
    keys = key.shape[2]
    allowed = None
    if mask != "all":
        allowed = to_dense(parse(mask), mask_tensors, batch, heads, length, keys, query.device)
    step = max(1, _SCORES_AT_ONCE // max(1, heads * length * keys))
    parts = [
        _attend(
            query[start : start + step],
            key[start : start + step],
            value[start : start + step],
            _batches(allowed, start, step),
            _batches(bias, start, step),
            slopes, sinks, scale, mask_fill, empty_rows, softcap,
        )
        for start in range(0, batch, step)
    ]  # fmt: skip
    if not parts:
        return query.new_empty((*query.shape[:3], value.shape[3]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_SCORES_AT_ONCE = 1 << 21


def _batches(tensor: Tensor | None, start: int, step: int) -> Tensor | None:
    """Some batches of what broadcasts to ``[batch, heads, length, keys]``."""
    return tensor if tensor is None or tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[start : start + step]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    mask_fill: float | None,
    empty_rows: str,
    softcap: float,
) -> Tensor:
    values = spread_heads(query, value)
    scores = scores_of(query, key.to(values.dtype), scale, softcap, bias, slopes)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf if mask_fill is None else mask_fill)
    weights = softmax_of(scores, sinks, empty_rows)
    return (weights @ values).to(query.dtype)


attention = register(
    "attention",
    f"(Tensor query, Tensor key, Tensor value, {SCORE_OPERANDS}, Tensor? sinks=None, *, "
    "float scale, str mask='all', float? mask_fill=None, str empty_rows='nan', float softcap=0.0) -> Tensor",
    reference,
    weighed_values,
    two_products,
)
