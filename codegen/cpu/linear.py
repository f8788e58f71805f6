"""Lowering linear layers: pick a kernel by measurement, emit it on flat operands."""

from __future__ import annotations

import math

import torch
from torch import fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.linear_kernels import KERNELS, LinearShape, Operands
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir.memory import give_back
from regraft.ir.nodes import arguments, dtype, rank, shape
from regraft.ir.ops.activation import activate

aten = torch.ops.aten

_WORTH_GIVING_BACK = 1 << 20  # numbers of a weight


def lower_linear(context: Context, node: fx.Node, tuner: Tuner) -> Lowered:
    """``aten.linear`` or ``regraft::linear``; a weight that is computed at run time stays a plain product."""
    given = arguments(node)
    x: fx.Node = given["x"] if "x" in given else given["input"]
    weight, bias = given["weight"], given["bias"]
    multiplier, residual = given.get("multiplier"), given.get("residual")
    activation = given.get("activation", "none")
    if not _packable(context, node, x, weight):
        return Lowered(full=_plain(context, x, weight, bias, activation, multiplier, residual))
    tensor = context.weight(weight)
    rows = _rows(node)
    form = LinearShape(
        rows=rows,
        in_features=tensor.shape[1],
        out_features=tensor.shape[0],
        dtype=tensor.dtype,
        has_bias=bias is not None,
        activation=activation,
        has_multiplier=multiplier is not None,
        has_residual=residual is not None,
    )
    operands = Operands(
        x=context.flat(x),
        weight=tensor,
        bias=None if bias is None else context.value(bias),
        multiplier=None if multiplier is None else context.flat(multiplier),
        residual=None if residual is None else context.flat(residual),
        activation=activation,
        rows=rows,
        hint=weight.name,
    )
    made = KERNELS[tuner.choose(form, tensor)](context, operands)
    if tensor.numel() >= _WORTH_GIVING_BACK:
        del tensor, operands  # a derived weight is a copy
        give_back()
    return Lowered(flat=made, fresh=True)


def _packable(context: Context, node: fx.Node, x: fx.Node, weight: fx.Node) -> bool:
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
