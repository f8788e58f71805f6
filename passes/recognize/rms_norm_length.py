"""Recognise RMSNorm written by lengths: ``x / |x| * sqrt(size)``, whose root mean square is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir import ops
from regraft.ir.nodes import Builder, dtype, shape
from regraft.ir.pattern import add, anything, div, either, maybe, mul, operator, reciprocal, scalar
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize.reading import is_last_dim, is_near, is_vector
from regraft.passes.recognize.rms_norm import scale_of

aten = torch.ops.aten
_length = operator(aten.linalg_vector_norm.default)
_at_least = operator(aten.clamp.default)
_expanded = operator(aten.expand.default)

#: A floor of the root mean square as low as this is eps: what it changes is no activation.
_LOW = 1e-7


class RecognizeRmsNormByLength(Rule):
    """``x / |x| * sqrt(size)`` (TokenFormer, arXiv:2410.23168). Nothing is added to the length: a row of zeros is NaN
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


class RecognizeRmsNormOfUnit(Rule):
    """``F.normalize(x, dim=-1) * sqrt(size) * weight``, or ``x / (|x| / sqrt(size)).clamp(min=floor) * weight``.

    The floor becomes an eps of its square. The two agree but for rows whose root mean square is about as low. A weight
    that is no vector (one of each head, or of each sample) multiplies what was normed without.
    """

    recognizes = "rms_norm"
    landmark = "length"

    def pattern(self, x: Any, weight: Any) -> Any:
        length = _length(x, 2, [-1], True).named("length")
        low = _at_least(either(mul(length, scalar("share")), div(length, scalar("parts")), length), scalar("floor"))
        normed = div(x, maybe(lambda y: _expanded(y, anything()), low)).named("normed")
        scale = either(add(weight, scalar("offset")), weight).named("scale")
        return either(
            mul(mul(normed, scalar("root")), scale),
            mul(mul(normed, scale), scalar("root")),
            mul(normed, mul(scale, scalar("root"))),
            mul(normed, scalar("root")),
            mul(normed, scale),
        )

    def check(self, match: Match) -> Iterator[Requirement]:
        size = shape(match.x)[-1]
        yield need(isinstance(size, int), "the size to normalise is not known", match.x)
        yield need(dtype(match.x).itemsize >= 4, "the norm is rounded to a narrow type", match.normed)
        yield need(dtype(match.root) == dtype(match.x), "the weight has another type", match.root)
        factor = match.get("root", 1.0) / match.get("share", 1 / match.get("parts", 1.0))
        yield need(
            is_near(factor, math.sqrt(size)), f"the unit is scaled by {factor:.6g}, not sqrt({size})", match.root
        )
        yield need(match.floor >= 0, "the floor of the length is below zero", match.normed)
        yield need(_floor(match) <= _LOW, f"the root mean square is at least {_floor(match):.3g}", match.normed)
        yield need(match.sole_user("normed"), "the unit is used without the weight", match.normed)

    def replace(self, match: Match, build: Builder) -> Replacement:
        eps = _floor(match) ** 2
        if "scale" in match and not is_vector(match.weight, shape(match.x)[-1]):
            normed = build.call(ops.rms_norm, match.x, None, eps, 0.0, "before_weight")
            return build.call(aten.mul.Tensor, normed, match.scale)
        weight, offset = scale_of(match)
        return build.call(ops.rms_norm, match.x, weight, eps, offset, "before_weight")


def _floor(match: Match) -> float:
    """The least root mean square: the clamp is of the norm, or of a share of it."""
    share = match.get("share", 1 / match.get("parts", 1.0))
    return float(match.floor / share / math.sqrt(shape(match.x)[-1]))


def _example(
    name: str, function: Callable[..., Tensor], reason: str = "", type_: torch.dtype = torch.float32
) -> Example:
    """A function of ``x [2, 3, 16]`` and ``weight [16]``."""

    def make() -> tuple[Any, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        tensors = torch.randn(2, 3, 16, generator=generator), torch.rand(16, generator=generator) + 0.5
        return function, tuple(tensor.to(type_) for tensor in tensors)

    return Example(name, make, reason)


RecognizeRmsNormByLength.examples = (
    _example("divided, then scaled", lambda x, w: x / x.norm(2, -1, keepdim=True) * 4),
    _example("scaled, then divided", lambda x, w: x * 4 / torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
    _example("by one over the length", lambda x, w: x * (4 / x.norm(dim=-1, keepdim=True))),
)
RecognizeRmsNormByLength.near_misses = (
    _example(
        "the sum of magnitudes",
        lambda x, w: x / x.norm(1, -1, keepdim=True) * 4,
        "the length is not that of Euclid",
    ),
    _example(
        "over columns",
        lambda x, w: x / x.norm(2, -2, keepdim=True) * 4,
        "the length is not over the last dimension",
    ),
    _example(
        "another scale",
        lambda x, w: x / x.norm(2, -1, keepdim=True) * 3,
        "the length is not scaled to the root of the size",
    ),
)


def _shared(x: Tensor, weight: Tensor, floor: float = 1e-8) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / (length * 16**-0.5).clamp(min=floor) * weight


RecognizeRmsNormOfUnit.examples = (
    _example("root, then weight", lambda x, w: F.normalize(x, dim=-1) * 4.0 * w),
    _example("weight, then root", lambda x, w: F.normalize(x, dim=-1) * w * 16**0.5),
    _example("an offset", lambda x, w: F.normalize(x, dim=-1) * 4.0 * (w + 1)),
    _example("the weight holds the root", lambda x, w: F.normalize(x, dim=-1) * (w * 4.0)),
    _example("the root mean square alone", _shared),
    _example("no weight", lambda x, w: F.normalize(x, dim=-1) * 4.0),
    _example("a weight of each row", lambda x, w: F.normalize(x, dim=-1) * w.expand(3, 16).cumsum(0) * 4.0),
)
RecognizeRmsNormOfUnit.near_misses = (
    _example("another scale", lambda x, w: F.normalize(x, dim=-1) * 10.0 * w, "the unit is scaled by 10, not sqrt(16)"),
    _example("a unit vector", lambda x, w: F.normalize(x, dim=-1) * w, "the unit is scaled by 1"),
    _example("a floor that shows", lambda x, w: _shared(x, w, 1e-3), "the root mean square is at least 0.001"),
    _example("a floor below zero", lambda x, w: _shared(x, w, -1e-3), "the floor of the length is below zero"),
    _example("bf16", lambda x, w: F.normalize(x, dim=-1) * 4.0 * w, "rounded to a narrow type", torch.bfloat16),
)
