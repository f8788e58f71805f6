"""Norms over channels as models write them, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[..., Any]


def example(name: str, function: Function, reason: str = "") -> Example:
    """A function of ``x [2, 6, 4, 5]``, ``weight`` and ``bias`` ``[6]``."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        return function, tuple(torch.randn(size, generator=generator) for size in ((2, 6, 4, 5), (6,), (6,)))

    return Example(name, make, reason)


def normalized(x: Tensor, dim: int = 1, variance_dim: int = 1) -> Tensor:
    """Centered, and divided by the root of the mean square."""
    centered = x - x.mean(dim, keepdim=True)
    return centered / torch.sqrt(centered.pow(2).mean(variance_dim, keepdim=True) + 1e-6)


EXAMPLES = (
    example("convnext", lambda x, w, b: w[:, None, None] * normalized(x) + b[:, None, None]),
    example("viewed weight", lambda x, w, b: normalized(x) * w.view(1, 6, 1, 1) + b.view(1, -1, 1, 1)),
    example(
        "variance", lambda x, w, b: (x - x.mean(1, True)) * (x.var(1, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    ),
    example("bare", lambda x, w, b: normalized(x)),
    example("weight over columns, which stays outside", lambda x, w, b: normalized(x) * w[:5]),
)

NEAR_MISSES = (example("variance over rows", lambda x, w, b: normalized(x, 1, 2), "over different dims"),)
