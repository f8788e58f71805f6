"""``regraft::attention_lse`` and ``regraft::attention_max``: what a softmax over the keys knows of each row, without
the scores: their log-sum-exp, and the largest of them.

With the first, what is left of a softmax is a map of single scores: ``exp(s - lse)``. Weights can then be read along
the other axis: their transpose by ``regraft::attention_mapped`` with query and key exchanged, their column sums by
``regraft::attention_column_sums``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.attention_scores import SCORE_OPERANDS, one_product, row_blocks, with_sinks
from regraft.ir.ops.registry import register

_OPTIONS = "float scale, str mask='all', float? mask_fill=None, float softcap=0.0"


def reference(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    mask: str,
    mask_fill: float | None,
    softcap: float,
) -> Tensor:
    """The definition. ``query`` ``[batch, heads, length, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``,
    the rest as in ``regraft::attention``; a sink joins the sum. The result is ``[batch, heads, length]``, natural
    logarithm, in fp32 or wider; minus infinity for a row without a key. A few rows at a time."""
    out = _fake(query)
    for block in row_blocks(query, key, mask_tensors, bias, slopes, scale=scale, mask=mask, softcap=softcap):
        out[:, :, block.rows] = with_sinks(block.masked(mask_fill), sinks).logsumexp(-1)
    return out


def max_reference(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    mask: str,
    mask_fill: float | None,
    softcap: float,
) -> Tensor:
    """The largest score of each row, shaped as ``reference`` has it; a sink is no key."""
    out = _fake(query).fill_(-math.inf)
    if key.shape[2]:
        for block in row_blocks(query, key, mask_tensors, bias, slopes, scale=scale, mask=mask, softcap=softcap):
            out[:, :, block.rows] = block.masked(mask_fill).amax(-1)
    return out


def _fake(query: Tensor, **_: Any) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


attention_lse = register(
    "attention_lse",
    f"(Tensor query, Tensor key, {SCORE_OPERANDS}, Tensor? sinks=None, *, {_OPTIONS}) -> Tensor",
    reference,
    _fake,
    one_product,
)
attention_max = register(
    "attention_max",
    f"(Tensor query, Tensor key, {SCORE_OPERANDS}, *, {_OPTIONS}) -> Tensor",
    max_reference,
    _fake,
    one_product,
)
