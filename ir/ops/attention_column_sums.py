"""``regraft::attention_column_sums``: how much weight each key receives from all queries, without the weights.

``sum_i softmax(scores)_ij``, a sum over rows for each head and key: what token pruning by received attention and
key-value cache eviction rank by (Kim et al., "Learned Token Pruning", KDD 2022; Zhang et al., "H2O", NeurIPS 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.attention_scores import SCORE_OPERANDS, one_product, row_blocks, softmax_of
from regraft.ir.ops.registry import register


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
    empty_rows: str,
    softcap: float,
) -> Tensor:
    """The definition. Operands are those of ``regraft::attention``; the result is ``[batch, heads, keys]`` in fp32 or
    wider, for every head of the queries. A few rows at a time, of each all keys: their softmax needs no other pass."""
    out: Tensor = _fake(query, key).zero_()
    for block in row_blocks(query, key, mask_tensors, bias, slopes, scale=scale, mask=mask, softcap=softcap):
        out += softmax_of(block.masked(mask_fill), sinks, empty_rows).sum(-2)
    return out


def _fake(query: Tensor, key: Tensor, **_: Any) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((query.shape[0], query.shape[1], key.shape[2]), dtype=wide)


attention_column_sums = register(
    "attention_column_sums",
    f"(Tensor query, Tensor key, {SCORE_OPERANDS}, Tensor? sinks=None, *, "
    "float scale, str mask='all', float? mask_fill=None, str empty_rows='nan', float softcap=0.0) -> Tensor",
    reference,
    _fake,
    one_product,
)
