"""Recognise gated linear units: an activated projection times another projection of the same input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import Builder, arguments, is_call, shape, sizes_equal
from regraft.ir.ops.activation import activation_name
from regraft.ir.pattern import Call, anything, mul, operator
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import glu_examples as shown

aten = torch.ops.aten
torch_glu = operator(aten.glu.default)

#: What opens a gate: activations of one tensor.
_ACTIVATIONS = (
    ops.activation,
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.softplus.default,
)

_PROJECTIONS = (aten.linear.default, aten.matmul.default)
_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.expand.default)
_MOVES = (
    aten.slice.Tensor,
    aten.select.int,
    aten.reshape.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.to.dtype,
)


class RecognizeGlu(Rule):
    """``activation(gate) * up``.

    Not every activated factor gates a linear unit: both must be linear projections of one input, or parts of
    one packed projection.
    """

    recognizes = "glu"
    examples = shown.GLU
    near_misses = shown.GLU_NEAR_MISSES

    def pattern(self, gate: Any, up: Any) -> Any:
        return mul(Call(_ACTIVATIONS, (gate,), loose=True).named("activated"), up)

    def check(self, match: Match) -> Iterator[Requirement]:
        gate, up = projection(match.gate), projection(match.up)
        yield need(gate is not None, "the gate is not a linear projection", match.gate)
        yield need(up is not None, "the activated value multiplies no linear projection", match.up)
        yield need(_part(match.gate) is not _part(match.up), "the gate multiplies itself", match.gate)
        together = gate is up or projected(gate) is projected(up)
        yield need(together, "gate and up are projections of different inputs", match.up)
        yield need(sizes_equal(shape(match.gate), shape(match.up)), "gate and up differ in shape", match.up)
        named = activation_name(match.activated) is not None
        yield need(named, f"{match.activated.target} has other parameters than the usual ones", match.activated)
        yield need(match.sole_user("activated"), "the activated gate is used elsewhere", match.activated)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(ops.glu, match.gate, match.up, activation_name(match.activated))


class RecognizeTorchGlu(Rule):
    """``torch.nn.functional.glu``: the second half gates the first."""

    recognizes = "glu"
    landmark = "call"
    examples = shown.TORCH_GLU
    near_misses = shown.TORCH_GLU_NEAR_MISSES

    def pattern(self, x: Any) -> Any:
        return torch_glu(x, anything("axis")).named("call")

    def check(self, match: Match) -> Iterator[Requirement]:
        size, rank = shape(match.x)[-1], len(shape(match.x))
        yield need(match.axis in (-1, rank - 1), "halves another dimension than the last", match.root)
        yield need(isinstance(size, int), "the size to halve is not known", match.x)

    def replace(self, match: Match, build: Builder) -> Replacement:
        size = shape(match.x)[-1]
        up = build.call(aten.slice.Tensor, match.x, -1, 0, size // 2)
        gate = build.call(aten.slice.Tensor, match.x, -1, size // 2, size)
        return build.call(ops.glu, gate, up, "sigmoid")


def projection(node: fx.Node) -> fx.Node | None:
    """The matrix product that ``node`` is a part or a view of, bias included, maybe clamped, scaled or shifted by a
    number; None when there is none."""
    seen_bias = False
    while not is_call(node, _PROJECTIONS):
        if is_call(node, (aten.add.Tensor,)) and not seen_bias and not _by_number(node):
            seen_bias = True
        elif not is_call(node, _MOVES) and not _by_number(node):
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node = source
    return node


def _by_number(node: fx.Node) -> bool:
    """Whether a call works on each element with numbers alone."""
    return is_call(node, _BY_NUMBER) and len(node.all_input_nodes) == 1


_BY_NUMBER = (aten.clamp.default, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor)


def _part(node: Any) -> fx.Node:
    """The part of a projection that a value is, before numbers clamp, scale or shift it."""
    while isinstance(node, fx.Node) and (_by_number(node) or is_call(node, (aten.to.dtype,))):
        node = node.args[0]
    return cast(fx.Node, node)


def projected(node: fx.Node | None) -> Any:
    """What a projection projects, without views on it."""
    source = next(iter(arguments(node).values())) if node is not None else None
    while isinstance(source, fx.Node) and is_call(source, _VIEWS):
        source = source.args[0]
    return source
