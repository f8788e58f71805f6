"""The scores that all definitions of attention share, a few rows at a time, and the softmax's weights of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from regraft.ir.mask import parse, to_broadcast
from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.registry import Cost, traffic

#: What makes scores beside queries and keys, in the schema of every operator that reads them (``scores_of``).
SCORE_OPERANDS = "Tensor[] mask_tensors, Tensor? bias=None, Tensor? slopes=None"
_SCORES_AT_ONCE = 1 << 21


def scores_of(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    first_row: int = 0,
    first_key: int = 0,
) -> Tensor:
    """``softcap(scale * q k^T) + bias + slopes * (key - query)``, ``[batch, heads, rows, keys]`` in ``key``'s type.

    ``query`` ``[batch, heads, rows, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``; ``bias`` broadcasts to
    the result. They may be a part of a larger whole, which begins at ``first_row`` and ``first_key``.
    """
    scores = _product(query.to(key.dtype), key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        rows, keys = scores.shape[-2:]
        places = torch.arange(first_row, first_row + rows, device=query.device)[:, None]
        distance = torch.arange(first_key, first_key + keys, device=query.device) - places
        scores = scores + slopes.to(key.dtype)[:, None, None] * distance
    return scores


def _product(query: Tensor, key: Tensor) -> Tensor:
    """``q k^T``; heads that share keys read them once."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads == kv_heads:
        return query @ key.mT
    rows = query.shape[2]
    packed = query.reshape(query.shape[0], kv_heads, heads // kv_heads * rows, query.shape[3])
    return (packed @ key.mT).reshape(query.shape[0], heads, rows, key.shape[2])


class Block(NamedTuple):
    """``scores`` ``[batch, heads, rows, keys]`` of some ``rows``, and which are ``seen``: a mask that broadcasts to
    them, or None for all."""

    rows: slice
    scores: Tensor
    seen: Tensor | None

    def masked(self, fill: float | None) -> Tensor:
        """The scores, which it changes, with ``fill``, or minus infinity, where a row does not see a key."""
        if self.seen is None:
            return self.scores
        return self.scores.masked_fill_(~self.seen, -math.inf if fill is None else fill)


def row_blocks(
    query: Tensor,
    key: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    *,
    scale: float,
    mask: str,
    softcap: float,
    first: int = 0,
    keys: int | None = None,
) -> Iterator[Block]:
    """The scores of ``regraft::attention`` in fp32 or wider, so many rows at a time that neither they nor their mask
    are ever in memory as a whole.

    ``key`` ``[batch, kv_heads, part, head_dim]`` may be those from ``first`` on of ``keys``; mask and bias are those of
    all keys.
    """
    batch, heads, length = query.shape[:3]
    part = key.shape[2]
    whole, here = part if keys is None else keys, slice(first, first + part)
    key = key.to(torch.promote_types(query.dtype, torch.float32))
    if bias is not None and bias.dim() and bias.shape[-1] != 1:
        bias = bias[..., here]
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * part))
    for start in range(0, length, step):
        rows = slice(start, start + step)
        seen = None
        if mask != "all":
            seen = to_broadcast(parse(mask), mask_tensors, heads, length, whole, query.device, some=rows)
            seen = seen if seen.shape[-1] == 1 else seen[..., here]
        added = of_rows(bias, rows)
        scores = scores_of(query[:, :, rows], key, scale, softcap, added, slopes, first_row=start, first_key=first)
        yield Block(rows, scores, seen)


def spread_heads(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values ``[batch, kv_heads, …]``, one for each head of ``query``, in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return tensor.repeat_interleave(query.shape[1] // max(1, tensor.shape[1]), 1).to(wide)


def of_rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows of what broadcasts to ``[batch, heads, length, keys]``."""
    return tensor if tensor is None or tensor.dim() < 2 or tensor.shape[-2] == 1 else tensor[..., rows, :]


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The scores with the sink of each head ``[heads]`` as a last column."""
    if sinks is None:
        return scores
    column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1)


def softmax_of(scores: Tensor, sinks: Tensor | None, empty_rows: str) -> Tensor:
    """The weights of masked scores; ``sinks`` and ``empty_rows`` as in ``regraft::attention``."""
    weights = with_sinks(scores, sinks).softmax(-1)[..., : scores.shape[-1]]
    if empty_rows == "zero" and sinks is None:
        weights = weights.masked_fill_((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return weights


def one_product(node: fx.Node) -> Cost:
    """What reading the scores costs: one matrix product of queries and keys. A kernel that makes a second pass, or that
    shares the product with an attention beside it, is not told apart."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    keys = concrete(given["key"].meta["val"].shape[2])
    return Cost(2.0 * batch * heads * length * keys * head_dim, traffic(node))


def two_products(node: fx.Node) -> Cost:
    """What attention costs: a product of queries and keys, and one of weights and values. A mask is counted as dense:
    what is skipped depends on the kernel."""
    given = arguments(node)
    batch, heads, length, head_dim = (concrete(size) for size in given["query"].meta["val"].shape)
    keys, value_dim = (concrete(size) for size in given["value"].meta["val"].shape[-2:])
    return Cost(2.0 * batch * heads * length * keys * (head_dim + value_dim), traffic(node))


def weighed_values(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """The fake kernel of attention: a value for each query. Keys and values come in heads of the same number, of which
    several queries may share one: a kernel finds a head of values by that of its keys."""
    heads = key.shape[1], value.shape[1]
    torch._check(heads[0] == heads[1], lambda: f"attention has keys of {heads[0]} heads and values of {heads[1]}")
    return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
