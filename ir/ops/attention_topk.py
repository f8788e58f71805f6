"""``regraft::attention_topk``: the keys with the highest scores of each row, before the softmax.

What decoding over selected keys chooses by (Yang et al., "TidalDecode", arXiv:2410.05076). Where queries share keys
they may choose together, by their highest score, so that one selection serves the whole group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.attention_scores import SCORE_OPERANDS, one_product, row_blocks
from regraft.ir.ops.registry import register


def reference(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    mask: str,
    softcap: float,
    count: int,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """The definition. Operands are those of ``regraft::attention``; the results are scores in fp32 or wider, the
    highest first, and the places of their keys, ``[batch, heads, length, count]``; of equal scores any may come first.
    With ``shared`` the heads that share keys choose together: ``[batch, kv_heads, length, count]``. A row that sees
    fewer keys ends with minus infinity at the place -1. Raises ``ValueError`` when there are fewer keys than
    ``count``. A few rows at a time."""
    keys = key.shape[2]
    if not 0 < count <= keys:
        raise ValueError(f"{count} keys were to be selected of {keys}; give a number from 1 to {keys}")
    values, index = _fake(query, key, count, shared)
    for block in row_blocks(query, key, mask_tensors, bias, slopes, scale=scale, mask=mask, softcap=softcap):
        scores = block.masked(None)
        if shared:
            scores = scores.unflatten(1, (key.shape[1], -1)).amax(2)
        best = scores.topk(count, -1)
        values[:, :, block.rows] = best.values
        index[:, :, block.rows] = best.indices.masked_fill(best.values == -math.inf, -1)
    return values, index


def _fake(query: Tensor, key: Tensor, count: int, shared: bool, **_: Any) -> tuple[Tensor, Tensor]:
    sizes = query.shape[0], key.shape[1] if shared else query.shape[1], query.shape[2], count
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(sizes, dtype=wide), query.new_empty(sizes, dtype=torch.int64)


attention_topk = register(
    "attention_topk",
    f"(Tensor query, Tensor key, {SCORE_OPERANDS}, *, "
    "float scale, str mask='all', float softcap=0.0, int count, bool shared=False) -> (Tensor, Tensor)",
    reference,
    _fake,
    one_product,
)
