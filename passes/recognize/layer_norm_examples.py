"""LayerNorm as models write it out, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[..., Any]


def example(name: str, function: Function, dtype: torch.dtype = torch.float32, reason: str = "") -> Example:
    """A function of ``x [2, 3, 8]``, ``weight [8]`` and ``bias [8]``."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 3, 8), (8,), (8,)))
        return function, tuple(tensor.to(dtype) for tensor in (x, weight, bias))

    return Example(name, make, reason)


def normalized(x: Tensor, dim: int = -1, variance_dim: int = -1) -> Tensor:
    """Centered, and divided by the root of the mean square."""
    centered = x - x.mean(dim, keepdim=True)
    return centered * torch.rsqrt(centered.pow(2).mean(variance_dim, keepdim=True) + 1e-5)


def from_variance(x: Tensor, of: Tensor, unbiased: bool) -> Tensor:
    """Centered, and divided by the root of the variance of ``of``."""
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(of.var(-1, unbiased=unbiased, keepdim=True) + 1e-5)


def cohere(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In fp32 throughout, without a bias."""
    return (weight.float() * normalized(x.float())).to(x.dtype)


def widened(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In fp32, with a bias that is not cast itself."""
    return (normalized(x.float()) * weight + bias).to(x.dtype)


def by_moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The variance as a difference of two means."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x * x).mean(-1, keepdim=True) - mean**2 + 1e-5) * weight + bias


def by_einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The variance as a product of vectors."""
    centered = x - x.mean(-1, keepdim=True)
    square = torch.einsum("btd,btd->bt", centered, centered) / x.shape[-1]
    return centered * torch.rsqrt(square + 1e-5)[..., None] * weight + bias


def weight_first(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As it is read from left to right in the paper's formula."""
    return weight * (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) + bias


def root(x: Tensor) -> Tensor:
    """``1 / sqrt(var + eps)``."""
    return torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)


def flax(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The weight scales the inverse root."""
    return (x - x.mean(-1, True)) * (root(x) * weight) + bias


EXAMPLES = (
    example("weight and bias", lambda x, w, b: normalized(x) * w + b),
    example("bias first", lambda x, w, b: b + w * normalized(x)),
    example("bare", lambda x, w, b: normalized(x)),
    example("bias alone", lambda x, w, b: normalized(x) + b),
    example("biased variance", lambda x, w, b: w * from_variance(x, x, False) + b),
    example(
        "correction zero",
        lambda x, w, b: (x - x.mean(-1, True)) * (x.var(-1, correction=0, keepdim=True) + 1e-5) ** -0.5,
    ),
    example("weight first", weight_first),
    example("weight first, without a bias", lambda x, w, b: w * (x - x.mean(-1, True)) * root(x)),
    example(
        "weight first, mean square",
        lambda x, w, b: (d := x - x.mean(-1, True)) * w / (d.pow(2).mean(-1, True) + 1e-5).sqrt() + b,
    ),
    example("weight on the root", flax),
    example(
        "weight over the root", lambda x, w, b: (x - x.mean(-1, True)) * (w / (x.var(-1, False, True) + 1e-5).sqrt())
    ),
    example("by moments", by_moments),
    example("by moments, far from zero", lambda x, w, b: by_moments(x + 30, w, b)),
    example("by einsum", by_einsum),
    example("cohere, fp32", cohere),
    example("cohere, bf16", cohere, torch.bfloat16),
    example("widened, bf16", widened, torch.bfloat16),
)

NEAR_MISSES = (
    example("mean over tokens", lambda x, w, b: normalized(x, 1) * w + b, reason="the mean is not over the last"),
    example(
        "variance over tokens",
        lambda x, w, b: normalized(x, -1, 1),
        reason="the variance is not over the last",
    ),
    example(
        "unbiased variance, weight first",
        lambda x, w, b: w * (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
        reason="it divides by n - 1",
    ),
    example("unbiased variance", lambda x, w, b: from_variance(x, x, True) * w, reason="it divides by n - 1"),
    example(
        "unbiased spread, eps outside",
        lambda x, w, b: w * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6),
        reason="expected aten.sqrt.default",
    ),
    example("another population", lambda x, w, b: from_variance(x, x * w, False), reason="of another tensor"),
)
