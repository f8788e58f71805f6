"""Recognise a LayerNorm over the channels of an image ``[batch, channels, height, width]``, written out (ConvNeXt)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, dtype, is_call, is_tensor, rank, shape
from regraft.ir.pattern import add, anything, either, maybe, mean, mul, operator, power, scalar, sub
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import layer_norm_channels_examples as shown
from regraft.passes.recognize.reading import is_vector
from regraft.passes.recognize.rms_norm import over_root

aten = torch.ops.aten
var_correction = operator(aten.var.correction)
var_unbiased = operator(aten.var.dim)


class RecognizeChannelNorm(Rule):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over another dim than the last, with the weight along it: a
    LayerNorm of the tensor with that dim moved to the end."""

    recognizes = "layer_norm"
    examples = shown.EXAMPLES
    near_misses = shown.NEAR_MISSES

    def pattern(self, x: Any, weight: Any, bias: Any) -> Any:
        centered = sub(x, mean(x, anything("axes"), True)).named("centered")
        variance = either(
            mean(power(centered, 2), anything("variance_axes"), True),
            var_correction(x, anything("variance_axes"), correction=0, keepdim=True),
            var_unbiased(x, anything("variance_axes"), False, True),
        )
        normed = over_root(centered, add(variance, scalar("eps"))).named("normed")
        weighted = maybe(lambda y: mul(y, weight), normed, "weighted").named("before_bias")
        return maybe(lambda y: add(y, bias), weighted, "shifted")

    def check(self, match: Match) -> Iterator[Requirement]:
        dim = _dim(match)
        if dim is None:  # the last one, which is no channel
            return
        size = shape(match.x)[dim]
        yield need(
            list(match.axes) == list(match.variance_axes), "mean and variance are over different dims", match.normed
        )
        yield need(isinstance(size, int), "the normalised size is not known", match.x)
        yield need(isinstance(match.eps, (int, float)), "eps is not a number", match.normed)
        for name, inner in (("weight", "normed"), ("bias", "before_bias")):
            if name in match:
                vector = _along(match[name], rank(match.x) - dim, size)
                yield need(vector is not None, f"the {name} is not one number for each normalised entry", match[name])
                yield need(dtype(match[name]) == dtype(match.x), f"the {name} is of another type", match[name])
                yield need(match.sole_user(inner), f"the value before the {name} is used elsewhere", match[inner])

    def replace(self, match: Match, build: Builder) -> Replacement:
        dims, dim = rank(match.x), _dim(match)
        if dim is None:
            return None
        last = [*(place for place in range(dims) if place != dim), dim]
        weight, bias = (_along(match.get(name), dims - dim, shape(match.x)[dim]) for name in ("weight", "bias"))
        turned = build.call(aten.permute.default, match.x, last)
        normed = build.call(aten.layer_norm.default, turned, [shape(match.x)[dim]], weight, bias, match.eps)
        return build.call(aten.permute.default, normed, [last.index(place) for place in range(dims)])


def _dim(match: Match) -> int | None:
    """The one dim that is normalised, None where it is the last one or there are several."""
    dims = rank(match.x)
    places = {axis % dims for axis in match.axes} if dims else set()
    return places.pop() if len(places) == 1 and places != {dims - 1} else None


def _along(node: Any, dims: int, size: Any) -> fx.Node | None:
    """The vector that a tensor is, where of its last ``dims`` dims the first alone is larger than one, and none before
    them."""
    if not is_tensor(node) or rank(node) < dims:
        return None
    sizes = list(shape(node))
    if sizes[-dims:] != [size, *[1] * (dims - 1)] or any(extent != 1 for extent in sizes[:-dims]):
        return None
    while is_call(node, (aten.unsqueeze.default, aten.reshape.default)):
        node = node.args[0]
    return node if is_vector(node, size) else None
