"""Examples and near misses of the attention rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir.rule import Example

_SCALE = 1 / math.sqrt(8)


def _heads(function: Callable[..., Any], kv_heads: int = 4) -> Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The function, and query, key and value ``[2, heads, 5, 8]``."""

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(0)
        return function, tuple(torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, kv_heads, kv_heads))

    return make


def _seen(query: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[-2])[None] <= torch.arange(query.shape[-2])[:, None]


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query @ key.mT * _SCALE).masked_fill(~_seen(query, key), -math.inf)
    return scores.softmax(-1) @ value


def _softcapped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (20 * (query @ key.mT * _SCALE / 20).tanh()).softmax(-1) @ value


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    weights = (query @ keys.mT / math.sqrt(8)).softmax(-1, torch.float32)
    return weights.to(query.dtype) @ values


def _two_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (query @ key.mT * _SCALE).softmax(-1)
    return torch.cat([weights @ value, weights @ value.flip(1)], -1)


def _two_masks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each query sees what came before, and apart from that what is near."""
    scores, places = query @ key.mT * _SCALE, torch.arange(5)
    past = scores.masked_fill(places > places[:, None], -math.inf).softmax(-1) @ value
    near = scores.masked_fill((places - places[:, None]).abs() > 1, -math.inf).softmax(-1) @ value
    return torch.cat([past, near], -1)


def _scores_returned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT
    return scores.softmax(-1) @ value, scores


def _zeroed_again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.arange(5) > torch.arange(5)[:, None] - 2  # the first two rows see no key
    scores = (query @ key.mT * _SCALE).masked_fill(hidden, torch.finfo(query.dtype).min)
    return scores.softmax(-1).masked_fill(hidden, 0.0) @ value


def _without_nan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.arange(5) > torch.arange(5)[:, None] - 2
    return (query @ key.mT).masked_fill(hidden, -math.inf).softmax(-1).nan_to_num() @ value


def _safe(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.arange(5) > torch.arange(5)[:, None] - 2
    scores = (query @ key.mT * _SCALE).masked_fill(hidden, -math.inf)
    return torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1)) @ value


def _rows_zeroed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.arange(5) > torch.arange(5)[:, None] - 2
    scores = (query @ key.mT * _SCALE).masked_fill(hidden, torch.finfo(query.dtype).min)
    return torch.where((~hidden).any(-1, keepdim=True), scores.softmax(-1), 0.0) @ value


def _zeroed_elsewhere(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.arange(5) > torch.arange(5)[:, None]
    return (query @ key.mT).softmax(-1).masked_fill(hidden, 0.0) @ value


def _zeroed_in_part(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden, first = torch.arange(5) > torch.arange(5)[:, None] - 2, torch.arange(5) == 0
    scores = (query @ key.mT).masked_fill(hidden, torch.finfo(query.dtype).min)
    return scores.masked_fill(first, -math.inf).softmax(-1).masked_fill(hidden, 0.0) @ value


def _weights_returned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    weights = (query @ key.mT).softmax(-1)
    return weights @ value, weights


def _each(query: Tensor) -> Tensor:
    """A mask of its own for each batch, with a dim more in front."""
    seen = torch.arange(5) <= torch.arange(1, 6)[:, None]
    return torch.stack([seen, seen.T])[None, :, None]


ATTENTION = (
    Example("causal, by masked_fill", _heads(_causal)),
    Example("softcap", _heads(_softcapped)),
    Example("grouped queries, softmax in fp32", _heads(_grouped, kv_heads=2)),
    Example("one weight for two values", _heads(_two_values)),
    Example("the same scores under two masks", _heads(_two_masks)),
    Example("weights of hidden keys are zeroed, rows without a key too", _heads(_zeroed_again)),
    Example("NaN of rows without a key is zero", _heads(_without_nan)),
    Example("a safe softmax: rows of minus infinity alone are zero", _heads(_safe)),
    Example("rows without a key are zeroed by a condition on rows", _heads(_rows_zeroed)),
)
ATTENTION_NEAR_MISSES = (
    Example(
        "softmax over the queries",
        _heads(lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
        "softmax runs over dim -2, not over the keys",
    ),
    Example("weights alone are masked", _heads(_zeroed_elsewhere), "set to zero where the scores are not masked"),
    Example("one mask of two zeroes weights", _heads(_zeroed_in_part), "not all masks set weights to zero"),
    Example("the weights are returned", _heads(_weights_returned), "attention weights are used outside the attention"),
    Example("the scores are returned", _heads(_scores_returned), "attention scores are used outside the attention"),
    Example(
        "scaled after the softcap",
        _heads(lambda q, k, v: (20 * (q @ k.mT / 20).tanh() * 3).softmax(-1) @ v),
        "the scores are scaled after the softcap",
    ),
)
SDPA = (
    Example(
        "five dims",
        _heads(lambda q, k, v: F.scaled_dot_product_attention(*(x[None].expand(3, *x.shape) for x in (q, k, v)))),
    ),
    Example("plain", _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))),
    Example("causal", _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))),
    Example(
        "grouped queries", _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), kv_heads=2)
    ),
)
SDPA_NEAR_MISSES = (
    Example(
        "six dims",
        _heads(lambda q, k, v: F.scaled_dot_product_attention(*(x[None, None] for x in (q, k, v)))),
        "the query has neither 3, 4 nor 5 dims",
    ),
    Example(
        "five dims, and a mask for each of the first",
        _heads(lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=_each(q))),
        "a mask differs along the middle one of three leading dims",
    ),
)
