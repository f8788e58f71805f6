"""Recognise activation functions written out: SiLU, quick GELU and squared ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from regraft.ir import ops
from regraft.ir.nodes import Builder
from regraft.ir.pattern import mul, power, relu, scalar, sigmoid
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import activation_examples as shown
from regraft.passes.recognize.reading import is_near

aten = torch.ops.aten


class RecognizeSilu(Rule):
    """``x * sigmoid(x)`` (also known as swish)."""

    recognizes = "activation"
    examples = shown.SILU

    def pattern(self, x: Any) -> Any:
        return mul(x, sigmoid(x))

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.silu.default, match.x)


class RecognizeQuickGelu(Rule):
    """``x * sigmoid(1.702 * x)`` (CLIP)."""

    recognizes = "activation"
    examples = shown.QUICK_GELU
    near_misses = shown.QUICK_GELU_NEAR_MISSES

    def pattern(self, x: Any) -> Any:
        return mul(x, sigmoid(mul(x, scalar("slope"))).named("gate"))

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(is_near(match.slope, 1.702), f"the slope is {match.slope}, not 1.702", match.gate)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(ops.activation, match.x, "quick_gelu")


class RecognizeReluSquared(Rule):
    """``relu(x)**2`` (So et al., "Primer", 2021)."""

    recognizes = "activation"
    examples = shown.RELU_SQUARED

    def pattern(self, x: Any) -> Any:
        return power(relu(x), 2)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(ops.activation, match.x, "relu_squared")
