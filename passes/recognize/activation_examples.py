"""Activation functions as models write them out, and what only looks like them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regraft.ir.rule import Example

Function = Callable[[Tensor], Tensor]
_ROOT = math.sqrt(2 / math.pi)


def example(name: str, function: Function, reason: str = "") -> Example:
    """A function of one tensor ``[4, 16]``."""

    def make() -> tuple[Function, tuple[Tensor, ...]]:
        return function, (torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),)

    return Example(name, make, reason)


def gelu(x: Tensor, divisor: float = math.sqrt(2.0)) -> Tensor:
    """The exact form, as BERT had it."""
    return x * 0.5 * (1.0 + torch.erf(x / divisor))


def gelu_new(x: Tensor, factor: float = _ROOT, cubic: float = 0.044715) -> Tensor:
    """The tanh form, as GPT-2 has it."""
    return 0.5 * x * (1.0 + torch.tanh(factor * (x + cubic * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    """The tanh form with ``x`` taken out of the sum."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


SILU = (
    example("sigmoid last", lambda x: x * torch.sigmoid(x)),
    example("sigmoid first", lambda x: torch.sigmoid(x) * x),
)
QUICK_GELU = (example("quick gelu", lambda x: x * torch.sigmoid(1.702 * x)),)
QUICK_GELU_NEAR_MISSES = (
    example("another slope", lambda x: x * torch.sigmoid(1.7 * x), "the slope is 1.7, not 1.702"),
)
RELU_SQUARED = (
    example("square", lambda x: torch.relu(x).square()),
    example("power", lambda x: torch.relu(x) ** 2),
)
GELU = (
    example("bert", gelu),
    example("inverse root", lambda x: 0.5 * (x * (1.0 + torch.erf(x * 0.7071067811865476)))),
    example("bell halved", lambda x: x * (0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))))),
    example("divided by two", lambda x: x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2),
)
GELU_NEAR_MISSES = (example("another width", lambda x: gelu(x, 1.5), "not of x / sqrt(2)"),)
GELU_TANH = (
    example("gelu_new", gelu_new),
    example("gelu_fast", gelu_fast),
    example("cube by products", lambda x: 0.5 * x * (1 + torch.tanh(_ROOT * (x + 0.044715 * (x * x * x))))),
)
GELU_TANH_NEAR_MISSES = (
    example("another factor", lambda x: gelu_new(x, factor=0.8), "the factor is 0.8, not sqrt(2 / pi)"),
    example("another cubic term", lambda x: gelu_new(x, cubic=0.0447), "the cubic term has 0.0447"),
)
