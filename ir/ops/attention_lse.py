"""``regraft::attention_lse``: the log-sum-exp of each query's scores over all keys, without the scores.

With it, what is left of a softmax is a map of single scores: ``exp(s - lse)``. Weights can then be read along the other
axis (their transpose, their column sums) by ``regraft::attention_mapped`` with query and key exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.attention_scores import scores_of
from regraft.ir.ops.registry import Cost, register, traffic

_SCORES_AT_ONCE = 1 << 21


def reference(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """The definition. ``query`` ``[batch, heads, length, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``;
    the result is ``[batch, heads, length]``, natural logarithm, in fp32 or wider. A few rows at a time."""
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).to(wide)
    batch, heads, length = query.shape[:3]
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * key.shape[2]))
    out = query.new_empty((batch, heads, length), dtype=wide)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        out[:, :, rows] = scores_of(query[:, :, rows], keys, scale, softcap).logsumexp(-1)
    return out


@torch.library.custom_op(
    "regraft::attention_lse",
    mutates_args=(),
    schema="(Tensor query, Tensor key, *, float scale, float softcap=0.0) -> Tensor",
)
def _attention_lse(query: Tensor, key: Tensor, *, scale: float, softcap: float = 0.0) -> Tensor:
    return reference(query, key, scale, softcap)


@_attention_lse.register_fake
def _fake(query: Tensor, key: Tensor, *, scale: float, softcap: float = 0.0) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape[:3], dtype=wide, device=query.device)


def cost(node: fx.Node) -> Cost:
    """One matrix product."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    keys = concrete(given["key"].meta["val"].shape[2])
    return Cost(2.0 * batch * heads * length * keys * head_dim, traffic(node))


attention_lse = register("attention_lse", _attention_lse, reference, cost)
