"""Recognise a LayerNorm written out by hand as ``aten.layer_norm``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, dtype, rank, shape
from regraft.ir.pattern import add, anything, either, maybe, mean, mul, operator, power, scalar, sub, to_dtype
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import layer_norm_examples as shown
from regraft.passes.recognize.reading import is_last_dim, is_vector, widening_source
from regraft.passes.recognize.rms_norm import over_root, weighted_root

aten = torch.ops.aten
var_correction = operator(aten.var.correction)
clamp = operator(aten.clamp.default)
var_unbiased = operator(aten.var.dim)


class RecognizeLayerNorm(Rule):
    """``(x - mean) / sqrt(var + eps) * weight + bias``; weight, bias and casts may be missing.

    A variance written ``mean(x**2) - mean(x)**2`` loses digits where the mean is large against the deviation; the norm
    does not, so that it is accepted for being closer to fp64 than the source.
    """

    recognizes = "layer_norm"
    landmark = "centered"
    examples = shown.EXAMPLES
    near_misses = shown.NEAR_MISSES

    def pattern(self, x: Any, measured: Any, weight: Any, bias: Any) -> Any:
        centered = sub(x, mean(x, anything("axes"), True)).named("centered")
        moments = sub(mean(power(x, 2), anything("variance_axes"), True), power(mean(x, anything("axes"), True), 2))
        variance = either(
            mean(power(centered, 2), anything("variance_axes"), True),
            var_correction(measured, anything("variance_axes"), correction=anything("correction"), keepdim=True),
            moments,
            clamp(moments, 0),
            var_unbiased(measured, anything("variance_axes"), anything("unbiased"), True),
        )
        above = add(variance, scalar("eps"))
        weighted = either(
            over_root(mul(centered, weight).named("normed"), above),
            weighted_root(centered, weight, above),
            maybe(lambda y: mul(y, weight), over_root(centered, above).named("normed"), "weighted"),
        ).named("before_bias")
        shifted = maybe(lambda y: add(y, bias), weighted, "shifted")
        return maybe(lambda y: to_dtype(y, anything()), shifted, "cast")

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(is_last_dim(match.axes), "the mean is not over the last dimension", match.centered)
        yield need(is_last_dim(match.variance_axes), "the variance is not over the last dimension", match.normed)
        measured = match.get("measured", match.x)
        yield need(measured in (match.x, match.centered), "the variance is of another tensor", measured)
        biased = match.get("correction", 0) == 0 and match.get("unbiased", False) is False
        yield need(biased, "the variance is unbiased: it divides by n - 1", match.normed)
        yield need(isinstance(match.eps, (int, float)), "eps is not a number", match.normed)
        size = shape(match.x)[-1] if rank(match.x) else None
        yield need(isinstance(size, int), "the normalised size is not known", match.x)
        for name, inner in (("weight", "normed"), ("bias", "before_bias")):
            if name in match:
                yield need(is_vector(match[name], size), f"the {name} is not a vector", match[name])
                yield need(dtype(match[inner]) == dtype(match.x), f"rounded before the {name}", match[inner])
                yield need(match.sole_user(inner), f"the value before the {name} is used elsewhere", match[inner])

    def replace(self, match: Match, build: Builder) -> Replacement:
        size = shape(match.x)[-1]
        x, weight, bias = match.x, match.get("weight"), match.get("bias")
        narrow = [None if node is None else widening_source(node) for node in (x, weight, bias)]
        if match.cast == "wrapped" and all(node is None or dtype(node) == dtype(match.root) for node in narrow):
            return build.call(aten.layer_norm.default, narrow[0], [size], narrow[1], narrow[2], match.eps)
        weight, bias = (_in_type_of(x, node, build) for node in (weight, bias))
        result = build.call(aten.layer_norm.default, x, [size], weight, bias, match.eps)
        return result if dtype(result) == dtype(match.root) else build.call(aten.to.dtype, result, dtype(match.root))


def _in_type_of(x: fx.Node, node: fx.Node | None, build: Builder) -> fx.Node | None:
    if node is None or dtype(node) == dtype(x):
        return node
    return build.call(aten.to.dtype, node, dtype(x))
