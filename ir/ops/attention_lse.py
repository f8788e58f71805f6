"""``regraft::attention_lse`` and ``regraft::attention_max``: what a softmax over the keys knows of each row, without
the scores: their log-sum-exp, and the largest of them.

With the first, what is left of a softmax is a map of single scores: ``exp(s - lse)``. Weights can then be read along
the other axis: their transpose by ``regraft::attention_mapped`` with query and key exchanged, their column sums by
``regraft::attention_column_sums``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regraft.ir.ops.attention_scores import one_product, row_blocks, with_sinks
from regraft.ir.ops.registry import register

_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor[] mask_tensors, Tensor? bias=None, Tensor? slopes=None, {sinks}*, float scale, "
    "str mask='all', float? mask_fill=None, float softcap=0.0) -> Tensor"
)


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
    options = {"scale": scale, "mask": mask, "softcap": softcap}
    out: Tensor = _fake(query, key, mask_tensors, scale=scale)
    for block in row_blocks(query, key, mask_tensors, bias, slopes, **options):  # type: ignore[arg-type]
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
    options = {"scale": scale, "mask": mask, "softcap": softcap}
    out: Tensor = _max_fake(query, key, mask_tensors, scale=scale).fill_(-math.inf)
    if key.shape[2]:
        for block in row_blocks(query, key, mask_tensors, bias, slopes, **options):  # type: ignore[arg-type]
            out[:, :, block.rows] = block.masked(mask_fill).amax(-1)
    return out


@torch.library.custom_op(
    "regraft::attention_lse", mutates_args=(), schema=_ARGUMENTS.format(sinks="Tensor? sinks=None, ")
)
def _attention_lse(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return reference(query, key, mask_tensors, bias, slopes, sinks, scale, mask, mask_fill, softcap)


@_attention_lse.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("regraft::attention_max", mutates_args=(), schema=_ARGUMENTS.format(sinks=""))
def _attention_max(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return max_reference(query, key, mask_tensors, bias, slopes, scale, mask, mask_fill, softcap)


@_attention_max.register_fake
def _max_fake(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float,
    mask: str = "all",
    mask_fill: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


attention_lse = register("attention_lse", _attention_lse, reference, one_product)
attention_max = register("attention_max", _attention_max, max_reference, one_product)
