"""Weights of experts that are kept one an expert: reading them, and stacking them into one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape
from regraft.ir.program import Program
from regraft.ir.weights import WeightOp
from regraft.passes.recognize.moe_experts import (
    Experts,
    Gate,
    Projection,
    Refused,
    build_experts,
    float_source,
    read_gate,
    same_storage,
)

aten = torch.ops.aten


def read_linear(node: Any) -> tuple[fx.Node, Projection]:
    """``(input, projection)`` of a linear layer; raises ``Refused`` for any other node."""
    bias: Any = None
    if _adds_bias(node):
        node, bias = node.args[:2]
    if is_call(node, (aten.linear.default,)):
        given = arguments(node)
        if bias is not None and given["bias"] is not None:
            raise Refused("an expert adds two biases to one product", node)
        return given["input"], Projection(given["input"], given["weight"], bias or given["bias"], False)
    if is_call(node, (aten.matmul.default,)) and rank(node.args[1]) == 2:
        source, weight = node.args
        turned = is_call(weight, (aten.permute.default,))
        return source, Projection(source, weight.args[0] if turned else weight, bias, not turned)
    raise Refused("an expert is not made of linear layers", node)


def _adds_bias(node: Any) -> bool:
    if not is_call(node, (aten.add.Tensor,)) or arguments(node)["alpha"] != 1:
        return False
    return is_tensor(node.args[1]) and rank(node.args[1]) == 1


@dataclass(frozen=True)
class OneExpert:
    """What one expert computes from ``rows``: linear layers and the gate function between them."""

    rows: fx.Node
    gate: Gate
    first: Projection
    down: Projection
    up: Projection | None

    @property
    def form(self) -> tuple[Any, ...]:
        """What two experts must share to be entries of one operator."""
        gate, projections = self.gate, (self.first, self.down, self.up)
        described = gate.activation, gate.layout, gate.alpha, gate.limit, gate.up_offset
        return *described, tuple(part and _stored(part) for part in projections)


def read_expert(output: fx.Node) -> OneExpert:
    """The expert whose output a node is; raises ``Refused``."""
    inner, down = read_linear(output)
    gate = read_gate(float_source(inner))
    rows, first = read_linear(float_source(gate.first))
    up: Projection | None = None
    if gate.up is not None:
        up_rows, up = read_linear(float_source(gate.up))
        if up_rows is not rows:
            raise Refused("gate and up are projections of different inputs", gate.up)
    return OneExpert(rows, gate, first, down, up)


def join_experts(rows: fx.Node, experts: Sequence[OneExpert], program: Program) -> tuple[Projection, ...]:
    """First, down and, where there is one, up projection of all experts; raises ``Refused`` where they differ."""
    one = experts[0]
    odd = next((expert for expert in experts if expert.form != one.form), None)
    if odd is not None:
        raise Refused("the experts compute different functions", odd.down.rows)
    parts = [[expert.first for expert in experts], [expert.down for expert in experts]]
    ups = [expert.up for expert in experts if expert.up is not None]
    return tuple(projection_of(rows, tuple(part), program) for part in (*parts, *([ups] if ups else [])))


def whole_of(parts: list[fx.Node], program: Program) -> fx.Node | None:
    """The stacked tensor that the parts are the entries of, None where they are weights of their own; raises
    ``Refused`` where they are computed."""
    if all(is_call(part, (aten.select.int,)) for part in parts):
        whole = parts[0].args[0]
        entries = [(part.args[0], part.args[1], part.args[2]) for part in parts]
        wanted = [(whole, -len(shape(parts[0])) - 1, number) for number in range(len(parts))]
        if isinstance(whole, fx.Node) and shape(whole)[0] == len(parts) and entries == wanted:
            return whole
    if any(program.weight_name(part) is None for part in parts):
        raise Refused("the weights of an expert are computed", parts[0])
    return None


def stack_parts(parts: list[fx.Node], program: Program) -> fx.Node:
    """One tensor of all experts' parts."""
    whole = whole_of(parts, program)
    if whole is not None:
        return whole
    names = tuple(str(program.weight_name(part)) for part in parts)
    joined = program.weights.derive(f"{names[0]}.joined", WeightOp("concat", names, {"dim": 0}))
    sizes = [len(parts), *(int(size) for size in shape(parts[0]))]
    return program.derive_weight(f"{names[0]}.stacked", WeightOp("reshape", (joined,), {"shape": sizes}))


def projection_of(rows: fx.Node, parts: tuple[Projection, ...], program: Program) -> Projection:
    """One projection of every expert from those of each, to be stacked by ``emit``; raises ``Refused`` where they
    cannot be."""
    one = parts[0]
    if any(_stored(part) != _stored(one) for part in parts):
        raise Refused("the experts compute different functions", one.rows)
    whole_of([part.weight for part in parts], program)
    if one.bias is not None:
        whole_of([part.bias for part in parts if part.bias is not None], program)
    return Projection(rows, one.weight, one.bias, one.transposed, parts)


def _stored(part: Projection) -> tuple[Any, ...]:
    return part.transposed, part.bias is None, shape(part.weight)


def emit(build: Builder, root: fx.Node, experts: Experts, program: Program) -> fx.Node:
    """The operator in front of ``root``, with the weights of its experts stacked and all stored alike."""
    stored = experts.down.transposed

    def settled(projection: Projection) -> Projection:
        return same_storage(build, _stacked(projection, program), stored)

    up = None if experts.up is None else settled(experts.up)
    fields = {**vars(experts), "first": settled(experts.first), "down": settled(experts.down), "up": up}
    return build_experts(build, root, Experts(**fields))


def _stacked(projection: Projection, program: Program) -> Projection:
    parts = projection.parts
    if not parts:
        return projection
    weight = stack_parts([part.weight for part in parts], program)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = stack_parts(biases, program) if biases else None
    return Projection(projection.rows, weight, bias, projection.transposed)
