"""``regraft::attention_part`` and ``regraft::attention_merge``: attention over a part of the keys, and what such parts
are together.

A part is normalised over its own keys, and its log-sum-exp lies beside it as a last column. Parts merge exactly:
``sum_i exp(lse_i - lse) out_i`` with ``lse = logsumexp_i lse_i`` (Milakov and Gimelshein, arXiv:1805.02867; the split
over keys is that of FlashDecoding).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments
from regraft.ir.ops.attention_scores import SCORE_OPERANDS, row_blocks, spread_heads, two_products, with_sinks
from regraft.ir.ops.registry import Cost, elements, register, traffic


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    *,
    first: int,
    keys: int,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """``[batch, heads, length, value_dim + 1]`` in fp32 or wider: attention of ``query`` over the keys from ``first``
    on, ``key`` ``[batch, kv_heads, part, head_dim]`` and ``value`` ``[batch, kv_heads, part, value_dim]``, and the
    log-sum-exp of their scores. ``mask``, ``mask_tensors``, ``bias`` and ``slopes`` are those of ``regraft::attention``
    over all ``keys``. A row without a key here is 0, its log-sum-exp minus infinity. A few rows at a time.
    """
    part = key.shape[2]
    out: Tensor = _fake(query, value)
    values = spread_heads(query, value)
    operands = query, key, mask_tensors, bias, slopes
    for block in row_blocks(*operands, scale=scale, mask=mask, softcap=softcap, first=first, keys=keys):
        scores = with_sinks(block.masked(mask_fill), sinks)
        lse = scores.logsumexp(-1, keepdim=True)
        empty = lse == -math.inf
        weights = (scores - lse.masked_fill(empty, 0.0)).exp()[..., :part]
        out[:, :, block.rows, :-1] = weights @ values
        out[:, :, block.rows, -1:] = lse
    return out


def _fake(query: Tensor, value: Tensor, **_: Any) -> Tensor:
    return query.new_empty(
        (*query.shape[:3], value.shape[3] + 1), dtype=torch.promote_types(query.dtype, torch.float32)
    )


attention_part = register(
    "attention_part",
    f"(Tensor query, Tensor key, Tensor value, {SCORE_OPERANDS}, Tensor? sinks=None, *, int first, int keys, "
    "float scale, str mask='all', float? mask_fill=None, float softcap=0.0) -> Tensor",
    reference,
    _fake,
    two_products,
)


def merge_reference(parts: Tensor, dtype: torch.dtype, empty_rows: str = "nan") -> Tensor:
    """``[batch, heads, length, value_dim]`` in ``dtype``, from ``parts [parts, batch, heads, length, value_dim + 1]``;
    ``empty_rows`` as in ``regraft::attention``."""
    out, lse = parts[..., :-1], parts[..., -1:]
    largest = lse.amax(0)
    share = (lse - largest.masked_fill(largest == -math.inf, 0.0)).exp()
    total = share.sum(0)
    merged = (share * out).sum(0) / total
    return (merged.masked_fill(total == 0, 0.0) if empty_rows == "zero" else merged).to(dtype)


def _merge_fake(parts: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
    return parts.new_empty((*parts.shape[1:-1], parts.shape[-1] - 1), dtype=dtype)


def merge_cost(node: fx.Node) -> Cost:
    """Every number of every part is weighted and added."""
    return Cost(2.0 * elements(arguments(node)["parts"].meta["val"]), traffic(node))


attention_merge = register(
    "attention_merge",
    "(Tensor parts, *, ScalarType dtype, str empty_rows='nan') -> Tensor",
    merge_reference,
    _merge_fake,
    merge_cost,
)
