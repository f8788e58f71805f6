"""``regraft::select_keys``: the keys with the highest scores, for each key head, as an index that later layers read.

The selection of TidalDecode (Yang et al., arXiv:2410.05076): scores before the softmax; where queries share a key,
their highest counts, so that one index serves the whole group."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.attention_topk import reference as highest
from regraft.ir.ops.registry import Cost, register, traffic


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
