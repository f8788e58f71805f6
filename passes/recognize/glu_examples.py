"""Gated linear units as models write them, and products that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[..., Any]


def example(name: str, function: Function, reason: str = "") -> Example:
    """A function of ``x [2, 3, 8]`` and weights ``w``, ``v`` ``[12, 8]``."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((2, 3, 8), (12, 8), (12, 8))
        return function, tuple(torch.randn(size, generator=generator) for size in sizes)

    return Example(name, make, reason)


def packed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Gate and up are halves of one product."""
    gate, up = F.linear(x, w).chunk(2, dim=-1)
    return up * F.silu(gate)


def residual(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The activated value multiplies what is no projection."""
    return F.silu(F.linear(x, w[:8])) * x


def reused(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The activated gate leaves the unit."""
    gate = F.silu(F.linear(x, w))
    return gate * F.linear(x, v), gate


def over(activation: Callable[[Tensor], Tensor]) -> Function:
    """The unit with separate projections."""
    return lambda x, w, v: activation(F.linear(x, w)) * F.linear(x, v)


GLU = (
    example("silu", over(F.silu)),
    example("gelu", over(F.gelu)),
    example("gelu tanh", over(lambda gate: F.gelu(gate, approximate="tanh"))),
    example("relu", over(F.relu)),
    example("sigmoid", over(torch.sigmoid)),
    example("mish", over(F.mish)),
    example("hard swish", over(F.hardswish)),
    example("elu", over(F.elu)),
    example("leaky relu", over(F.leaky_relu)),
    example("softplus", over(F.softplus)),
    example(
        "clamped and shifted", lambda x, w, v: (F.linear(x, v).clamp(-1, 1) + 1) * F.silu(F.linear(x, w).clamp(max=1))
    ),
    example("up first", lambda x, w, v: F.linear(x, v) * F.silu(F.linear(x, w))),
    example("packed", packed),
    example("biased", lambda x, w, v: F.silu(F.linear(x, w, w[:, 0])) * F.linear(x, v, v[:, 0])),
    example("flattened tokens", lambda x, w, v: F.silu(F.linear(x.reshape(6, 8), w)) * F.linear(x, v).view(6, 12)),
)
GLU_NEAR_MISSES = (
    example("another elu", over(lambda gate: F.elu(gate, alpha=0.5)), "other parameters than the usual ones"),
    example(
        "scaled gate of itself", lambda x, w, v: F.relu(2 * (h := F.linear(x, w))) * h, "the gate multiplies itself"
    ),
    example("not a projection", residual, "multiplies no linear projection"),
    example(
        "another input",
        lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x + 1, v),
        "projections of different",
    ),
    example("squeeze and excite", lambda x, w, v: torch.sigmoid(F.linear(x, w)) * v.sum(), "multiplies no linear"),
    example("gate of itself", lambda x, w, v: F.relu(h := F.linear(x, w)) * h, "the gate multiplies itself"),
    example("activated gate returned", reused, "the activated gate is used elsewhere"),
    example("broadcast", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v[:1]), "differ in shape"),
)
TORCH_GLU = (example("last dimension", lambda x, w, v: F.glu(F.linear(x, w), -1)),)
TORCH_GLU_NEAR_MISSES = (
    example("channels", lambda x, w, v: F.glu(F.linear(x, w).transpose(1, 2), 1), "another dimension"),
)
