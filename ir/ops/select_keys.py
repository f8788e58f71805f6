"""``regraft::select_keys``: the keys with the highest scores, for each key head, as an index that later layers read.

The selection of TidalDecode (Yang et al., arXiv:2410.05076): scores before the softmax; where queries share a key,
their highest counts, so that one index serves the whole group."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from regraft.ir.mask import parse, to_dense
from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.registry import Cost, register, traffic


def reference(
    query: Tensor, key: Tensor, mask_tensors: list[Tensor], scale: float, mask: str, count: int
) -> tuple[Tensor, Tensor]:
    """The definition. ``query`` ``[batch, heads, length, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``;
    the results are ``[batch, kv_heads, count]``: places of keys in rising order, and whether the query sees them (a
    row may see fewer than ``count``). Raises ``ValueError`` when there are fewer keys than ``count``."""
    batch, heads, length = query.shape[:3]
    kv_heads, keys = key.shape[1:3]
    if not 0 < count <= keys:
        raise ValueError(f"{count} keys were to be selected of {keys}; give a number from 1 to {keys}")
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, kv_heads, -1, query.shape[-1])
    scores = grouped @ key.to(wide).mT * scale
    if mask != "all":
        seen = to_dense(parse(mask), mask_tensors, batch, heads, length, keys, query.device)
        scores = scores.masked_fill(~seen.reshape(scores.shape), -math.inf)
    best = scores.amax(2)
    index = best.topk(count, -1).indices.sort(-1).values
    return index, best.gather(-1, index) > -math.inf


@torch.library.custom_op(
    "regraft::select_keys",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor[] mask_tensors, *, float scale, str mask='all', int count) "
    "-> (Tensor, Tensor)",
)
def _select_keys(
    query: Tensor, key: Tensor, mask_tensors: list[Tensor], *, scale: float, mask: str = "all", count: int
) -> tuple[Tensor, Tensor]:
    return reference(query, key, mask_tensors, scale, mask, count)


@_select_keys.register_fake
def _fake(
    query: Tensor, key: Tensor, mask_tensors: list[Tensor], *, scale: float, mask: str = "all", count: int
) -> tuple[Tensor, Tensor]:
    sizes = key.shape[0], key.shape[1], count
    index = torch.empty(sizes, dtype=torch.int64, device=key.device)
    return index, torch.empty(sizes, dtype=torch.bool, device=key.device)


def cost(node: fx.Node) -> Cost:
    """One matrix product; attention beside it may share it."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    keys = concrete(given["key"].meta["val"].shape[2])
    return Cost(2.0 * batch * heads * length * keys * head_dim, traffic(node))


select_keys = register("select_keys", _select_keys, reference, cost)
