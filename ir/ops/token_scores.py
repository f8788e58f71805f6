"""``regraft::token_scores``: how important each token is, read off the attention of one site.

``"cls"``: what the first token gives to each, mean over heads (Liang et al., "EViT", ICLR 2022, section 3.1).
``"received"``: what all tokens together give to each, the column sums of the weights, mean over heads and rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.registry import Cost, register, traffic

KINDS = ("cls", "received")


def reference(query: Tensor, key: Tensor, keep: Tensor | None, scale: float, kind: str) -> Tensor:
    """The definition. ``query`` ``[batch, heads, tokens, head_dim]``, ``key`` ``[batch, kv_heads, tokens, head_dim]``;
    ``keep`` ``[batch, tokens]`` is true for tokens that are no padding: others score 0 and give nothing. The result
    is ``[batch, tokens]`` in fp32. Raises ``ValueError`` for a kind that is not known."""
    if kind not in KINDS:
        raise ValueError(f"unknown score {kind!r}; known: {', '.join(KINDS)}")
    rows = query[:, :, :1] if kind == "cls" else query
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = rows.float() @ keys.float().transpose(-1, -2) * scale
    if keep is None:
        return logits.softmax(-1).mean((1, 2))
    present = keep.bool()
    weights = logits.masked_fill(~present[:, None, None, :], -math.inf).softmax(-1)
    giving = present[:, :1] if kind == "cls" else present
    weights = weights.masked_fill(~giving[:, None, :, None], 0.0)
    return weights.mean(1).sum(1) / giving.sum(-1, keepdim=True).clamp(min=1)


@torch.library.custom_op(
    "regraft::token_scores",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor? keep=None, *, float scale, str kind) -> Tensor",
)
def _token_scores(query: Tensor, key: Tensor, keep: Tensor | None = None, *, scale: float, kind: str) -> Tensor:
    return reference(query, key, keep, scale, kind)


@_token_scores.register_fake
def _fake(query: Tensor, key: Tensor, keep: Tensor | None = None, *, scale: float, kind: str) -> Tensor:
    return torch.empty((query.shape[0], key.shape[2]), dtype=torch.float32, device=query.device)


def cost(node: fx.Node) -> Cost:
    """The product of the rows that are read with all keys."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    keys = concrete(given["key"].meta["val"].shape[2])
    read = 1 if given["kind"] == "cls" else length
    return Cost(2.0 * batch * heads * read * keys * head_dim, traffic(node))


token_scores = register("token_scores", _token_scores, reference, cost)
