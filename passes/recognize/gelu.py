"""Recognise both forms of GELU written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from regraft.ir.nodes import Builder
from regraft.ir.pattern import add, div, either, erf, mul, power, scalar, tanh
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import activation_examples as shown
from regraft.passes.recognize.reading import is_near

aten = torch.ops.aten


def half_of_product(x: Any, bell: Any) -> Any:
    """``0.5 * x * bell`` however it is grouped."""
    return either(
        mul(mul(x, 0.5), bell),
        mul(div(x, 2), bell),
        mul(mul(x, bell), 0.5),
        div(mul(x, bell), 2),
        mul(x, mul(bell, 0.5)),
        mul(x, div(bell, 2)),
    )


class RecognizeGelu(Rule):
    """``0.5 * x * (1 + erf(x / sqrt(2)))``."""

    recognizes = "activation"
    landmark = "bell"
    examples = shown.GELU
    near_misses = shown.GELU_NEAR_MISSES

    def pattern(self, x: Any) -> Any:
        scaled = either(div(x, scalar("divisor")), mul(x, scalar("inverse")))
        return half_of_product(x, add(erf(scaled).named("bell"), 1))

    def check(self, match: Match) -> Iterator[Requirement]:
        scale = match.inverse if "inverse" in match else 1 / match.divisor
        yield need(is_near(scale, math.sqrt(0.5)), f"erf of {scale:.6g} x, not of x / sqrt(2)", match.bell)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.gelu.default, match.x)


class RecognizeGeluTanh(Rule):
    """``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))`` (Hendrycks and Gimpel, 2016)."""

    recognizes = "activation"
    landmark = "bell"
    examples = shown.GELU_TANH
    near_misses = shown.GELU_TANH_NEAR_MISSES

    def pattern(self, x: Any) -> Any:
        factor, cubic = scalar("factor"), scalar("cubic")
        square = either(mul(power(x, 2), cubic), mul(mul(x, cubic), x))
        cube = either(mul(power(x, 3), cubic), mul(mul(power(x, 2), x), cubic), mul(square, x))
        stretched = add(square, 1)
        inside = either(
            mul(add(x, cube), factor),
            mul(mul(x, factor), stretched),
            mul(mul(x, stretched), factor),
        )
        return half_of_product(x, add(tanh(inside).named("bell"), 1))

    def check(self, match: Match) -> Iterator[Requirement]:
        root = math.sqrt(2 / math.pi)
        yield need(is_near(match.factor, root), f"the factor is {match.factor}, not sqrt(2 / pi)", match.bell)
        yield need(is_near(match.cubic, 0.044715), f"the cubic term has {match.cubic}, not 0.044715", match.bell)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.gelu.default, match.x, approximate="tanh")
