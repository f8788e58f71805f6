"""``regraft::token_scores``: how important each token is, read off the attention of one site.

``"cls"``: what the first token gives to each, mean over heads (Liang et al., "EViT", ICLR 2022, section 3.1).
``"last"``: what the last token gives to each (Chen et al., "FastV", ECCV 2024); the last that is no padding.
``"received"``: what all tokens together give to each, the column sums of the weights, mean over heads and rows.
``"flow"``: ``(a + b) |v|`` with ``a`` what the first token gives to each of the others, ``b`` the same from values
instead of queries and keys without a scale, ``|v|`` the L1 norm of the mean value (Tong et al., "FlowCut", 2025).
``"norm"``: the L2 norm of the key over all heads, by which DART picks its pivots (Wen et al., 2025, arXiv 2502.11494).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.attention_column_sums import reference as column_sums
from regraft.ir.ops.registry import Cost, register, traffic

#: Of the column sums of the kind "received": padding gives nothing and receives nothing.
PRESENT = "keys(0) & rows(0)"


@dataclass(frozen=True)
class Heads:
    """What a score reads: ``query`` ``[batch, heads, tokens, head_dim]``, ``key`` and ``value`` with as many heads, in
    fp32; ``present`` ``[batch, tokens]``, all of them where nothing is ``padded``."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    present: Tensor
    padded: bool
    scale: float

    def weights(self, rows: Tensor, shown: Tensor) -> Tensor:
        """The weights ``[batch, heads, rows, tokens]`` that rows of queries give to the keys that are ``shown``."""
        logits = rows @ self.key.transpose(-1, -2) * self.scale
        return _softmax(logits, shown)


def _softmax(logits: Tensor, shown: Tensor) -> Tensor:
    """Over the tokens ``[batch, tokens]`` that are shown; zero where none is."""
    hidden = ~shown[:, None, None, :]
    return logits.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)


def _cls(given: Heads) -> Tensor:
    weights = given.weights(given.query[:, :, :1], given.present).mean((1, 2))
    return weights.masked_fill(~given.present[:, :1], 0.0)


def _last(given: Heads) -> Tensor:
    places = torch.arange(given.present.shape[1], device=given.present.device)
    last = torch.where(given.present, places, 0).amax(-1)
    rows = given.query[torch.arange(len(last), device=last.device), :, last][:, :, None]
    return given.weights(rows, given.present).mean((1, 2))


def _received(given: Heads) -> Tensor:
    mask, masks = (PRESENT, [given.present]) if given.padded else ("all", [])
    sums = column_sums(given.query, given.key, masks, None, None, None, given.scale, mask, None, "zero", 0.0)
    return mean_received(sums, given.present)


def mean_received(sums: Tensor, present: Tensor | None) -> Tensor:
    """Scores ``[batch, tokens]`` of the kind "received" from ``regraft::attention_column_sums`` ``[batch, heads,
    tokens]``, masked by ``PRESENT`` where some tokens are not."""
    rows = sums.shape[2] if present is None else (present != 0).sum(-1, keepdim=True)
    return sums.mean(1) / (rows.clamp(min=1) if isinstance(rows, Tensor) else max(1, rows))


def _flow(given: Heads) -> Tensor:
    assert given.value is not None
    others = given.present.clone()
    others[:, 0] = False
    relation = given.weights(given.query[:, :, :1], others).mean((1, 2))
    meaning = _softmax(given.value[:, :, :1] @ given.value.transpose(-1, -2), others).mean((1, 2))
    strength = given.value.mean(1).abs().sum(-1)
    return (relation + meaning) * strength * others


def _norm(given: Heads) -> Tensor:
    return given.key.square().sum((1, 3)).sqrt() * given.present


_SCORES: dict[str, Callable[[Heads], Tensor]] = {
    "cls": _cls,
    "last": _last,
    "received": _received,
    "flow": _flow,
    "norm": _norm,
}
KINDS = tuple(_SCORES)
#: Kinds that read values.
OF_VALUES = frozenset(("flow",))


def reference(query: Tensor, key: Tensor, keep: Tensor | None, value: Tensor | None, scale: float, kind: str) -> Tensor:
    """The definition. ``query`` ``[batch, heads, tokens, head_dim]``, ``key`` and ``value`` ``[batch, kv_heads, tokens,
    …]``; ``keep`` ``[batch, tokens]`` is true for tokens that are no padding: others score 0 and give nothing. The
    result is ``[batch, tokens]`` in fp32. Raises ``ValueError`` for a kind that is not known, or lacks its values."""
    _check(kind, value is not None)
    batch, heads, tokens = query.shape[:3]
    present = query.new_ones((batch, tokens), dtype=torch.bool) if keep is None else keep.bool()
    groups = heads // key.shape[1]
    spread = [None if part is None else part.float().repeat_interleave(groups, dim=1) for part in (key, value)]
    assert spread[0] is not None
    return _SCORES[kind](Heads(query.float(), spread[0], spread[1], present, keep is not None, scale))


def _check(kind: str, has_values: bool) -> None:
    if kind not in _SCORES:
        raise ValueError(f"unknown score {kind!r}; known: {', '.join(KINDS)}")
    if kind in OF_VALUES and not has_values:
        raise ValueError(f"the score {kind!r} is read off values, and none were given")


def _fake(query: Tensor, key: Tensor, value: Tensor | None, kind: str, **_: Any) -> Tensor:
    _check(kind, value is not None)
    return torch.empty((query.shape[0], key.shape[2]), dtype=torch.float32, device=query.device)


def cost(node: fx.Node) -> Cost:
    """The product of the rows that are read with all keys."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    keys = concrete(given["key"].meta["val"].shape[2])
    read = {"received": length, "norm": 0, "flow": 2}.get(given["kind"], 1)
    return Cost(2.0 * batch * heads * read * keys * head_dim, traffic(node))


token_scores = register(
    "token_scores",
    "(Tensor query, Tensor key, Tensor? keep=None, Tensor? value=None, *, float scale, str kind) -> Tensor",
    reference,
    _fake,
    cost,
)
