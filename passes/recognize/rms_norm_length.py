"""RMSNorm written by lengths: ``x / |x| * sqrt(size)`` (TokenFormer, arXiv:2410.23168)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.nodes import Builder, dtype, shape
from regraft.ir.pattern import anything, div, either, mul, operator, reciprocal, scalar
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize.reading import is_last_dim, is_near

_length = operator(torch.ops.aten.linalg_vector_norm.default)


class RecognizeRmsNormByLength(Rule):
    """A row of length ``sqrt(size)`` has a mean square of one. Nothing is added to the length: a row of zeros is NaN
    either way."""

    recognizes = "rms_norm"
    landmark = "length"

    def pattern(self, x: Any) -> Any:
        length = _length(x, anything("order"), anything("axes"), True).named("length")
        factor = scalar("factor")
        return either(mul(div(x, length), factor), div(mul(x, factor), length), mul(x, mul(reciprocal(length), factor)))

    def check(self, match: Match) -> Iterator[Requirement]:
        size = shape(match.x)[-1]
        yield need(match.order == 2, "the length is not that of Euclid", match.length)
        yield need(is_last_dim(match.axes), "the length is not over the last dimension", match.length)
        yield need(isinstance(size, int), "the number of features is symbolic", match.length)
        yield need(
            is_near(match.factor, math.sqrt(size)), "the length is not scaled to the root of the size", match.root
        )
        wide = dtype(match.x) in (torch.float32, torch.float64) and dtype(match.root) == dtype(match.x)
        yield need(wide, "the source rounds the length to low precision", match.length)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(ops.rms_norm, match.x, None, 0.0, 0.0, "before_weight")


def _example(name: str, function: Callable[[Tensor], Tensor], reason: str = "") -> Example:
    def make() -> tuple[Any, tuple[Tensor, ...]]:
        return function, (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)),)

    return Example(name, make, reason)


RecognizeRmsNormByLength.examples = (
    _example("divided, then scaled", lambda x: x / x.norm(2, -1, keepdim=True) * 4),
    _example("scaled, then divided", lambda x: x * 4 / torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
    _example("by one over the length", lambda x: x * (4 / x.norm(dim=-1, keepdim=True))),
)
RecognizeRmsNormByLength.near_misses = (
    _example(
        "the sum of magnitudes",
        lambda x: x / x.norm(1, -1, keepdim=True) * 4,
        "the length is not that of Euclid",
    ),
    _example(
        "over columns",
        lambda x: x / x.norm(2, -2, keepdim=True) * 4,
        "the length is not over the last dimension",
    ),
    _example(
        "another scale",
        lambda x: x / x.norm(2, -1, keepdim=True) * 3,
        "the length is not scaled to the root of the size",
    ),
)
