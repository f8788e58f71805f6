"""Lowering linear layers: pick a kernel by measurement, emit it on flat operands."""

from __future__ import annotations

import math

import torch
from torch import fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.linear_kernels import KERNELS, LinearShape, Operands
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir import ops
from regraft.ir.memory import give_back
from regraft.ir.nodes import arguments, dtype, rank, shape
from regraft.ir.ops.activation import activate

aten = torch.ops.aten

_WORTH_GIVING_BACK = 1 << 18  # numbers of a weight


def lower_linear(context: Context, node: fx.Node, tuner: Tuner) -> Lowered:
    """``aten.linear`` or ``regraft::linear``; a weight that is computed at run time stays a plain product."""
    context.shared("kernels are chosen", lambda: _choose_kernels(context, tuner))
    given = arguments(node)
    x, weight, bias = _input(node), given["weight"], given["bias"]
    multiplier, residual = given.get("multiplier"), given.get("residual")
    activation = given.get("activation", "none")
    if not _packable(context, node):
        return Lowered(full=_plain(context, x, weight, bias, activation, multiplier, residual))
    tensor = context.weight(weight)
    form = _form(node)
    operands = Operands(
        x=context.flat(x),
        weight=tensor,
        bias=None if bias is None else context.value(bias),
        multiplier=None if multiplier is None else context.flat(multiplier),
        residual=None if residual is None else context.flat(residual),
        activation=activation,
        rows=form.rows,
        hint=weight.name,
    )
    made = KERNELS[tuner.choose(form, tensor)](context, operands)
    if tensor.numel() >= _WORTH_GIVING_BACK and context.program.weight_name(weight) in context.program.weights.derived:
        del tensor, operands  # a copy, whose place between packed weights is too small for most others
        give_back()
    return Lowered(flat=made, fresh=True)


def _choose_kernels(context: Context, tuner: Tuner) -> None:
    """Measure for all linear layers before a weight is packed: measuring takes memory, and packed weights stay."""
    for node in context.program.graph.nodes:
        if node.target in (aten.linear.default, ops.linear) and _packable(context, node):
            form = _form(node)
            if not tuner.knows(form):
                tuner.choose(form, context.weight(arguments(node)["weight"]))


def _input(node: fx.Node) -> fx.Node:
    given = arguments(node)
    found: fx.Node = given["x"] if "x" in given else given["input"]
    return found


def _form(node: fx.Node) -> LinearShape:
    """What a layer's kernel is chosen by; its weight is one that can be packed."""
    given = arguments(node)
    out_features, in_features = given["weight"].meta["val"].shape
    return LinearShape(
        rows=_rows(node),
        in_features=in_features,
        out_features=out_features,
        dtype=dtype(given["weight"]),
        has_bias=given["bias"] is not None,
        activation=given.get("activation", "none"),
        has_multiplier=given.get("multiplier") is not None,
        has_residual=given.get("residual") is not None,
    )


def _packable(context: Context, node: fx.Node) -> bool:
    x, weight = _input(node), arguments(node)["weight"]
    same_type = dtype(x) == dtype(weight)
    return context.is_weight(weight) and rank(x) >= 2 and same_type and context.can_unflatten(node)


def _rows(node: fx.Node) -> int | None:
    leading = shape(node)[:-1]
    return math.prod(leading) if all(isinstance(size, int) for size in leading) else None


def _plain(
    context: Context,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    activation: str,
    multiplier: fx.Node | None,
    residual: fx.Node | None,
) -> fx.Node:
    operands = [context.value(operand) for operand in (x, weight)]
    out = context.call(aten.linear.default, *operands, None if bias is None else context.value(bias))
    if activation != "none":
        out = context.call(activate, out, activation)
    if multiplier is not None:
        out = context.call(aten.mul.Tensor, out, context.value(multiplier))
    return out if residual is None else context.call(aten.add.Tensor, out, context.value(residual))
