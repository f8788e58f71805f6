"""Routed experts on token-expert pairs as models spell them, and what only looks like them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[..., Any]
_TOKENS, _EXPERTS, _TOP_K, _HIDDEN, _INNER = 5, 3, 2, 8, 8


def example(name: str, function: Function, dtype: torch.dtype = torch.float32, reason: str = "") -> Example:
    """A function of ``hidden [5, 8]``, ``index [5, 2]``, ``weight [5, 2]``, ``first [3, 16, 8]``, ``down [3,
    8, 8]`` and the biases of both."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        index = torch.randint(0, _EXPERTS - 1, (_TOKENS, _TOP_K), generator=generator)  # the last one gets no token
        weights = draw(_EXPERTS, 2 * _INNER, _HIDDEN), draw(_EXPERTS, _HIDDEN, _INNER)
        biases = draw(_EXPERTS, 2 * _INNER), draw(_EXPERTS, _HIDDEN)
        return function, (draw(_TOKENS, _HIDDEN), index, draw(_TOKENS, _TOP_K), *weights, *biases)

    return Example(name, make, reason)


def swiglu(packed: Tensor) -> Tensor:
    """The gate's half first."""
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped(packed: Tensor) -> Tensor:
    """Interleaved and clamped, as GPT-OSS has it."""
    gate, up = packed[..., ::2].clamp(max=1.5), packed[..., 1::2].clamp(min=-1.5, max=1.5)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.7))


def two_limits(packed: Tensor) -> Tensor:
    """Gate and up are clamped differently."""
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=2.0)) * up.clamp(-1.0, 1.0)


def grouped(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    function: Function = swiglu,
    inverse: Function = torch.argsort,
) -> Tensor:
    """Pairs sorted by expert, one product a projection (which torch exports in bf16 alone)."""
    ids, order = torch.sort(index.reshape(-1))
    counts = torch.histc(ids.float(), bins=_EXPERTS, min=0, max=_EXPERTS - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = x[order // _TOP_K]
    inner = torch._grouped_mm(rows, first.transpose(-2, -1), offs=offsets)
    inner = function(inner if first_bias is None else inner + first_bias[ids])
    out = torch._grouped_mm(inner, down.transpose(-2, -1), offs=offsets)
    out = out if down_bias is None else out + down_bias[ids]
    out = (out * weight.reshape(-1)[order].unsqueeze(-1))[inverse(order)]
    return out.view(_TOKENS, _TOP_K, _HIDDEN).sum(dim=1)


def scattered(order: Tensor) -> Tensor:
    """The inverse of a permutation by assignment."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0))
    return inverse


def gathered(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    function: Function = swiglu,
) -> Tensor:
    """Each pair's own copy of its expert's weights, batched products."""
    ids = index.reshape(-1)
    rows = x.repeat_interleave(_TOP_K, dim=0)
    inner = torch.bmm(first[ids], rows.unsqueeze(-1)).squeeze(-1)
    inner = function(inner if first_bias is None else inner + first_bias[ids])
    out = torch.bmm(inner.unsqueeze(1), down[ids].transpose(1, 2)).squeeze(1)
    out = out if down_bias is None else out + down_bias[ids]
    return (out * weight.reshape(-1, 1)).view(_TOKENS, _TOP_K, _HIDDEN).sum(dim=1)


def summed_in_place(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """Sorted pairs are added to their tokens' rows: no way back is needed."""
    order = torch.argsort(index.flatten())
    offsets = torch.cumsum(torch.bincount(index.flatten(), minlength=_EXPERTS), 0).to(torch.int32)
    token = order // _TOP_K
    inner = swiglu(torch._grouped_mm(x[token], first.transpose(-2, -1), offs=offsets))
    out = torch._grouped_mm(inner, down.transpose(-2, -1), offs=offsets)
    return torch.zeros_like(x).index_add(0, token, out * weight.flatten()[order][:, None])


def weighted_last(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """The weights are applied to ``[tokens, top_k, hidden]``."""
    ids = index.reshape(-1)
    inner = swiglu(torch.bmm(first[ids], x.repeat_interleave(_TOP_K, 0).unsqueeze(-1)).squeeze(-1))
    out = torch.bmm(down[ids], inner.unsqueeze(-1)).squeeze(-1)
    return (out.view(_TOKENS, _TOP_K, _HIDDEN) * weight.unsqueeze(-1)).sum(1)


def plain(function: Function) -> Function:
    """Without the biases."""
    return lambda x, index, weight, first, down, *_: function(x, index, weight, first, down)


def weights_out_of_order(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """The weights are multiplied in the source order, the outputs are sorted."""
    ids, order = torch.sort(index.reshape(-1))
    rows = x[order // _TOP_K].unsqueeze(-1)
    out = torch.bmm(down[ids], swiglu(torch.bmm(first[ids], rows).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
    out = (out * weight.reshape(-1, 1))[torch.argsort(order)]
    return out.view(_TOKENS, _TOP_K, _HIDDEN).sum(1)


def tokens_out_of_order(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """The tokens are in the source order, the expert ids are sorted."""
    ids, order = torch.sort(index.reshape(-1))
    rows = x.repeat_interleave(_TOP_K, 0).unsqueeze(-1)
    out = torch.bmm(down[ids], swiglu(torch.bmm(first[ids], rows).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
    out = (out * weight.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
    return out.view(_TOKENS, _TOP_K, _HIDDEN).sum(1)


def outputs_used(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Any:
    """The output of each expert is returned too."""
    ids = index.reshape(-1)
    inner = swiglu(torch.bmm(first[ids], x.repeat_interleave(_TOP_K, 0).unsqueeze(-1)).squeeze(-1))
    out = torch.bmm(down[ids], inner.unsqueeze(-1)).squeeze(-1)
    return (out * weight.reshape(-1, 1)).view(_TOKENS, _TOP_K, _HIDDEN).sum(1), out


def unweighted(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """The outputs are summed as they are."""
    ids = index.reshape(-1)
    inner = swiglu(torch.bmm(first[ids], x.repeat_interleave(_TOP_K, 0).unsqueeze(-1)).squeeze(-1))
    out = torch.bmm(down[ids], inner.unsqueeze(-1)).squeeze(-1)
    return out.view(_TOKENS, _TOP_K, _HIDDEN).sum(1)


def _with(**changes: Any) -> Function:
    return functools.partial(grouped, **changes)


def _gathered_with(function: Function) -> Function:
    return functools.partial(gathered, function=function)


def _overlapping(packed: Tensor) -> Tensor:
    return F.silu(packed[..., 1 : _INNER + 1]) * packed[..., _INNER:]


def _up_first(packed: Tensor) -> Tensor:
    return packed[..., :_INNER] * F.gelu(packed[..., _INNER:])


def ungated(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor, *_: Tensor) -> Tensor:
    """A plain two-layer expert."""
    return gathered(x, index, weight, first[:, :_INNER], down, function=F.relu)


PAIRS = (
    example("grouped", plain(grouped), torch.bfloat16),
    example("grouped with biases", grouped, torch.bfloat16),
    example("grouped, clamped and interleaved", _with(function=clamped), torch.bfloat16),
    example("grouped, inverse by assignment", _with(inverse=scattered), torch.bfloat16),
    example("grouped, added in place", summed_in_place, torch.bfloat16),
    example("gathered", plain(gathered)),
    example("gathered with biases", gathered),
    example("gathered, clamped and interleaved", _gathered_with(clamped)),
    example("gathered, weighted last", weighted_last),
    example("no gate", ungated),
    example("up before gate", _gathered_with(_up_first)),
)

PAIRS_NEAR_MISSES = (
    example("unknown activation", _gathered_with(lambda p: swiglu(p).cos()), reason="no known activation"),
    example("gate and up overlap", _gathered_with(_overlapping), reason="not the two halves"),
    example("clamped to two limits", _gathered_with(two_limits), reason="not clamped to one limit"),
    example("never brought back", _with(inverse=lambda order: order), torch.bfloat16, reason="not brought back"),
    example("weights in another order", weights_out_of_order, reason="the routing weights are in another order"),
    example("tokens in another order", tokens_out_of_order, reason="the rows of the tokens are in another order"),
    example("outputs used elsewhere", outputs_used, reason="used elsewhere"),
    example("no routing weights", unweighted, reason="not multiplied by routing weights"),
)
