"""Recognise RMSNorm in its flavours: plain, Llama (cast before the weight), Gemma (weight offset by one)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import Builder, dtype, rank, shape
from regraft.ir.pattern import (
    add,
    anything,
    div,
    either,
    maybe,
    mean,
    mul,
    power,
    reciprocal,
    rsqrt,
    scalar,
    sqrt,
    to_dtype,
)
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import rms_norm_examples as shown
from regraft.passes.recognize.reading import again, is_last_dim, is_vector, uncast, widening_source


def over_root(x: Any, variance: Any) -> Any:
    """``x / sqrt(variance)`` in its spellings."""
    return either(
        mul(x, rsqrt(variance)),
        div(x, sqrt(variance)),
        mul(x, reciprocal(sqrt(variance))),
        mul(x, power(variance, -0.5)),
        div(x, power(variance, 0.5)),
    )


def weighted_root(x: Any, weight: Any, variance: Any) -> Any:
    """``x * (weight / sqrt(variance))`` in its spellings; what ``x`` is multiplied with is named ``normed``."""
    inverse = either(rsqrt(variance), reciprocal(sqrt(variance)), power(variance, -0.5))
    weighted = either(mul(inverse, weight), div(weight, sqrt(variance)), div(weight, power(variance, 0.5)))
    return mul(x, weighted.named("normed"))


class RecognizeRmsNorm(Rule):
    """``x / sqrt(mean(x**2) + eps) * weight``, with the casts where the source has them.

    ``raised`` is what the mean is taken of: ``x`` itself, or its cast to fp32.
    """

    recognizes = "rms_norm"
    landmark = "variance"
    examples = shown.EXAMPLES
    near_misses = shown.NEAR_MISSES

    def pattern(self, x: Any, raised: Any, weight: Any) -> Any:
        variance = add(mean(power(raised, 2), anything("axes"), True), scalar("eps")).named("variance")
        normed = over_root(x, variance).named("normed")
        scale = either(add(weight, scalar("offset")), weight).named("scale")
        weighted = mul(raised, scale).named("normed")
        return either(
            weighted_first=over_root(weighted, variance),
            weighted_root=weighted_root(raised, scale, variance),
            rounded_first=mul(to_dtype(normed, anything()).named("rounded"), scale),
            rounded_last=maybe(lambda y: to_dtype(y, anything()), either(mul(normed, scale), normed), "cast"),
            tag="order",
        )

    def check(self, match: Match) -> Iterator[Requirement]:
        source, x = uncast(match.raised), match.get("x", match.raised)
        yield need(is_last_dim(match.axes), "the mean is not over the last dimension", match.variance)
        yield need(x in (match.raised, source), "the mean is of another tensor than what is divided", x)
        yield need(isinstance(match.eps, (int, float)), "eps is not a number", match.variance)
        yield need(rank(x) > 0, "a scalar has no dimension to normalise")
        if "scale" in match:
            yield need(is_vector(match.weight, shape(x)[-1]), "the weight is not a vector", match.weight)
            yield need(match.sole_user("normed"), "the normalised value is used without the weight", match.normed)
        if match.order in ("weighted_first", "weighted_root"):
            same = dtype(match.root) == dtype(x) == torch.promote_types(dtype(x), torch.float32)
            yield need(same, "the weight is applied first, and rounded", match.normed)
        cast = match.get("rounded") or (match.root if match.get("cast") == "wrapped" else None)
        if cast is not None:
            back = dtype(cast) == dtype(widening_source(match.raised))
            yield need(back, "the result is not cast back to the type of the input", cast)

    def replace(self, match: Match, build: Builder) -> Replacement:
        weight, offset = scale_of(match)
        if "rounded" in match:
            return build.call(ops.rms_norm, widening_source(match.raised), weight, match.eps, offset, "before_weight")
        if match.get("cast") == "wrapped":
            source = widening_source(match.raised)
            narrow = None if weight is None else widening_source(weight)
            return build.call(ops.rms_norm, source, narrow, match.eps, offset, "after_weight")
        raised = match.raised if match.raised is match.get("x", match.raised) else again(match.raised, build)
        return build.call(ops.rms_norm, raised, weight, match.eps, offset, "before_weight")


def scale_of(match: Match) -> tuple[fx.Node | None, float]:
    """The weight and its offset; a sum in another type than the product's is taken as the weight itself."""
    if "scale" not in match:
        return None, 0.0
    in_product = dtype(match.scale) == dtype(match.normed) or "rounded" in match
    if "offset" in match and in_product:
        return match.weight, float(match.offset)
    return match.scale, 0.0
