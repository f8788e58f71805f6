"""``regraft::select_keys``: the keys with the highest scores, for each key head, as an index that later layers read.

The selection of TidalDecode (Yang et al., arXiv:2410.05076): scores before the softmax; where queries share a key,
their highest counts, so that one index serves the whole group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.attention_scores import one_product
from regraft.ir.ops.attention_topk import reference as highest
from regraft.ir.ops.registry import register


def reference(
    query: Tensor, key: Tensor, mask_tensors: list[Tensor], scale: float, mask: str, count: int
) -> tuple[Tensor, Tensor]:
    """The definition. ``query`` ``[batch, heads, 1, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``; the
    results are ``[batch, kv_heads, count]``: places of keys in rising order, and whether the query sees them (a row may
    see fewer than ``count``; the place is 0 then). Raises ``ValueError`` for more queries, or fewer keys than
    ``count``."""
    if query.shape[2] != 1:
        raise ValueError(f"{query.shape[2]} queries were given; keys are selected for one, a step of decoding")
    _, index = highest(query, key, mask_tensors, None, None, scale, mask, 0.0, count, True)
    return in_rising_order(index, key.shape[2])


def in_rising_order(index: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The selection from what ``regraft::attention_topk`` gives of a single row, -1 for what it does not see."""
    index = index[:, :, 0].masked_fill(index[:, :, 0] < 0, keys).sort(-1).values  # what is not seen comes last
    return index.masked_fill(index == keys, 0), index < keys


def _fake(key: Tensor, count: int, **_: Any) -> tuple[Tensor, Tensor]:
    sizes = key.shape[0], key.shape[1], count
    index = torch.empty(sizes, dtype=torch.int64, device=key.device)
    return index, torch.empty(sizes, dtype=torch.bool, device=key.device)


select_keys = register(
    "select_keys",
    "(Tensor query, Tensor key, Tensor[] mask_tensors, *, float scale, str mask='all', int count) -> (Tensor, Tensor)",
    reference,
    _fake,
    one_product,
)
