"""RMSNorm as models spell it, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[..., Any]


def example(name: str, function: Function, dtype: torch.dtype = torch.float32, reason: str = "") -> Example:
    """A function of ``x [2, 3, 8]`` and ``weight [8]``."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 8, generator=generator).to(dtype)
        return function, (x, torch.rand(8, generator=generator).to(dtype) + 0.5)

    return Example(name, make, reason)


def inverse_root(x: Tensor, dim: int = -1) -> Tensor:
    """``1 / sqrt(mean(x**2) + eps)``."""
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-6)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """Rounded to the input's type, then weighted."""
    wide = x.float()
    return weight * (wide * inverse_root(wide)).to(x.dtype)


def t5(x: Tensor, weight: Tensor) -> Tensor:
    """Only the mean is computed on the wide input."""
    return weight * (x * inverse_root(x.float())).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    """The weight is an offset from one, applied in fp32."""
    wide = x.float()
    return (wide * inverse_root(wide) * (1.0 + weight.float())).type_as(x)


def olmo(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted in fp32, then rounded."""
    wide = x.float()
    return (weight * (wide * inverse_root(wide))).to(x.dtype)


def unrounded(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted value stays in fp32."""
    wide = x.float()
    return wide * inverse_root(wide) * weight


def unrounded_t5(x: Tensor, weight: Tensor) -> Tensor:
    """As T5, and the product stays in fp32."""
    return weight * (x * inverse_root(x.float()))


EXAMPLES = (
    example("plain", lambda x, w: x * inverse_root(x) * w),
    example("weighted first", lambda x, w: w * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    example("weight on the root", lambda x, w: x * (inverse_root(x) * w)),
    example("weight over the root", lambda x, w: x * (w / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6))),
    example("without weight", lambda x, w: x * inverse_root(x)),
    example("divided by the root", lambda x, w: w * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))),
    example("one over the root", lambda x, w: x * (1 / torch.sqrt(x.square().mean(-1, True) + 1e-6)) * w),
    example("power of minus a half", lambda x, w: x * (x.pow(2).mean(-1, True) + 1e-6) ** -0.5 * w),
    *(example(f"{f.__name__}, fp32", f) for f in (llama, t5, gemma, olmo)),
    *(example(f"{f.__name__}, bf16", f, torch.bfloat16) for f in (llama, t5, gemma, olmo, unrounded, unrounded_t5)),
)

NEAR_MISSES = (
    example(
        "mean over tokens",
        lambda x, w: x * inverse_root(x, 1) * w,
        reason="the mean is not over the last dimension",
    ),
    example("mean of another tensor", lambda x, w: x * inverse_root(x + w), reason="the mean is of another tensor"),
    example(
        "weighted first, bf16",
        lambda x, w: w * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        torch.bfloat16,
        reason="the weight is applied first, and rounded",
    ),
    example("cubes", lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6), reason="expected 2"),
    example(
        "sum instead of mean",
        lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        reason="aten.mean.dim",
    ),
)
