"""``regraft::attention_part`` and ``regraft::attention_merge``: attention over a part of the keys, and what such parts
are together.

A part is normalised over its own keys, and its log-sum-exp lies beside it as a last column. Parts merge exactly:
``sum_i exp(lse_i - lse) out_i`` with ``lse = logsumexp_i lse_i`` (Milakov and Gimelshein, arXiv:1805.02867; the split
over keys is that of FlashDecoding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.attention_scores import row_blocks, spread_heads, with_sinks
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
    out: Tensor = _fake(query, key, value, mask_tensors, first=first, keys=keys, scale=scale)
    values = spread_heads(query, value)
    options = {"scale": scale, "mask": mask, "softcap": softcap, "first": first, "keys": keys}
    for block in row_blocks(query, key, mask_tensors, bias, slopes, **options):  # type: ignore[arg-type]
        scores = with_sinks(block.masked(mask_fill), sinks)
        lse = scores.logsumexp(-1, keepdim=True)
        empty = lse == -math.inf
        weights = (scores - lse.masked_fill(empty, 0.0)).exp()[..., :part]
        out[:, :, block.rows, :-1] = weights @ values
        out[:, :, block.rows, -1:] = lse
    return out


@torch.library.custom_op(
    "regraft::attention_part",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor[] mask_tensors, Tensor? bias=None, Tensor? slopes=None, "
    "Tensor? sinks=None, *, int first, int keys, float scale, str mask='all', float? mask_fill=None, "
    "float softcap=0.0) -> Tensor",
)
def _attention_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    first: int,
    keys: int,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return reference(
        query, key, value, mask_tensors, bias, slopes, sinks,
        first=first, keys=keys, scale=scale, mask=mask, mask_fill=mask_fill, softcap=softcap,
    )  # fmt: skip


@_attention_part.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    first: int,
    keys: int,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return query.new_empty(
        (*query.shape[:3], value.shape[3] + 1), dtype=torch.promote_types(query.dtype, torch.float32)
    )


def cost(node: fx.Node) -> Cost:
    """Two matrix products over the keys of the part."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    part, value_dim = (concrete(size) for size in given["value"].meta["val"].shape[-2:])
    return Cost(2.0 * batch * heads * length * part * (head_dim + value_dim), traffic(node))


attention_part = register("attention_part", _attention_part, reference, cost)


def merge_reference(parts: Tensor, dtype: torch.dtype, empty_rows: str = "nan") -> Tensor:
    """``[batch, heads, length, value_dim]`` in ``dtype``, from ``parts [parts, batch, heads, length, value_dim + 1]``;
    ``empty_rows`` as in ``regraft::attention``."""
    out, lse = parts[..., :-1], parts[..., -1:]
    largest = lse.amax(0)
    share = (lse - largest.masked_fill(largest == -math.inf, 0.0)).exp()
    total = share.sum(0)
    merged = (share * out).sum(0) / total
    return (merged.masked_fill(total == 0, 0.0) if empty_rows == "zero" else merged).to(dtype)


@torch.library.custom_op(
    "regraft::attention_merge",
    mutates_args=(),
    schema="(Tensor parts, *, ScalarType dtype, str empty_rows='nan') -> Tensor",
)
def _attention_merge(parts: Tensor, *, dtype: torch.dtype, empty_rows: str = "nan") -> Tensor:
    return merge_reference(parts, dtype, empty_rows)


@_attention_merge.register_fake
def _merge_fake(parts: Tensor, *, dtype: torch.dtype, empty_rows: str = "nan") -> Tensor:
    return parts.new_empty((*parts.shape[1:-1], parts.shape[-1] - 1), dtype=dtype)


def merge_cost(node: fx.Node) -> Cost:
    """Every number of every part is weighted and added."""
    return Cost(2.0 * elements(arguments(node)["parts"].meta["val"]), traffic(node))


attention_merge = register("attention_merge", _attention_merge, merge_reference, merge_cost)
