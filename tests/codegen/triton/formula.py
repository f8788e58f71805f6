"""Attention by its formula (attention.md 3.1), in fp64, and operands to try it on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.ir.mask import parse, to_dense

SCALE, SOFTCAP = 0.3, 2.0


def draw(*size: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def operands(
    spec: AttentionSpec, batch: int, kv_heads: int, group: int, queries: int, keys: int, seed: int = 0
) -> dict[str, Any]:
    """Operands of a spec: queries as a projection leaves them in memory, a value for each operand it has."""
    heads, dtype = kv_heads * group, spec.dtype
    given: dict[str, Any] = {
        "query": draw(batch, queries, heads, spec.head_dim, seed=seed).transpose(1, 2).to(dtype),
        "key": draw(batch, kv_heads, keys, spec.head_dim, seed=seed + 1).to(dtype),
        "value": draw(batch, keys, kv_heads, spec.value_dim, seed=seed + 2).transpose(1, 2).to(dtype),
        "scale": SCALE,
    }
    if spec.softcap:
        given["softcap"] = SOFTCAP
    if spec.slopes:
        given["slopes"] = -draw(heads, seed=seed + 3).abs() / 8
    if spec.sinks:
        given["sinks"] = draw(heads, seed=seed + 4)
    if spec.bias != "none":
        rows = queries if spec.bias == "dense" else 1
        given["bias"] = draw(1, heads, rows, keys, seed=seed + 5).to(dtype)
    return given


def formula(
    spec: AttentionSpec, given: dict[str, Any], mask_tensors: list[Tensor], seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``seen`` takes the mask's place where it is given."""
    value = given["value"].double()
    value = value.repeat_interleave(given["query"].shape[1] // value.shape[1], 1)
    scores, seen = _scores(spec, given, mask_tensors, seen)
    keys = scores.shape[-1]
    if not spec.softmax:
        weights = _weights(spec.weight, scores) * seen
        return _normalised(spec, weights) @ value, torch.full(scores.shape[:3], math.nan)
    scores = scores.masked_fill(~seen, -math.inf if spec.mask_fill is None else spec.mask_fill)
    lse = scores.logsumexp(-1)
    if spec.sinks:
        sinks = given["sinks"].double().reshape(1, -1, 1, 1)
        highest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
        weights = (scores - highest).exp()
        return weights / (weights.sum(-1, keepdim=True) + (sinks - highest).exp()) @ value, lse
    weights = scores.softmax(-1)
    if spec.empty_rows != "nan":
        filling = 0.0 if spec.empty_rows == "zero" else 1 / keys
        weights = torch.where(torch.isneginf(lse)[..., None], filling, weights)
    return weights @ value, lse


def masked_scores(spec: AttentionSpec, given: dict[str, Any], mask_tensors: list[Tensor]) -> Tensor:
    """All scores of a softmax, masked."""
    scores, seen = _scores(spec, given, mask_tensors, None)
    return scores.masked_fill(~seen, -math.inf if spec.mask_fill is None else spec.mask_fill)


def _scores(
    spec: AttentionSpec, given: dict[str, Any], mask_tensors: list[Tensor], seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    query, key = (given[name].double() for name in ("query", "key"))
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if seen is None:
        seen = to_dense(parse(spec.mask), mask_tensors, batch, heads, queries, keys)
    scores = query @ key.repeat_interleave(heads // key.shape[1], 1).mT * given["scale"]
    if spec.softcap:
        scores = given["softcap"] * torch.tanh(scores / given["softcap"])
    if spec.bias != "none":
        scores = scores + given["bias"].double()
    if spec.slopes:
        scores = scores + given["slopes"].double()[:, None, None] * (
            torch.arange(keys) - torch.arange(queries)[:, None]
        )
    return scores, seen


def _weights(name: str, scores: Tensor) -> Tensor:
    return {
        "exp": lambda: scores.exp(),
        "sigmoid": lambda: 1 / (1 + (-scores).exp()),
        "relu": lambda: scores.clamp(min=0),
        "elu1": lambda: torch.where(scores > 0, scores + 1, scores.exp()),
        "gelu": lambda: scores * 0.5 * (1 + torch.erf(scores / math.sqrt(2))),
        "identity": lambda: scores,
    }[name]()


def _normalised(spec: AttentionSpec, weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return {
        "sum": lambda: weights / total,
        "none": lambda: weights,
        "sum_eps": lambda: weights / (total + spec.constant),
        "sum_abs": lambda: weights / total.abs().clamp(min=1),
        "constant": lambda: weights / spec.constant,
    }[spec.normaliser]()


def agree(given: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Assert that a kernel's numbers are those of the formula, NaN and infinities in the same places."""
    assert given.shape == wanted.shape
    finite = torch.isfinite(wanted)
    torch.testing.assert_close(given.double()[~finite], wanted[~finite], equal_nan=True)
    error = (given.double() - wanted)[finite].norm() / wanted[finite].norm().clamp(min=1e-30)
    assert float(error) <= (3e-6 if dtype == torch.float32 else 2e-3)
