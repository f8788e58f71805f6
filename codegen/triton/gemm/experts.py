"""Emitting the kernels of routed experts: pairs of tokens and experts sorted by expert, two grouped products, a sum.

The first product reads the tokens of its expert where they lie, and writes ``activation(gate) * up``; the second
writes each pair's result in its place; the third kernel adds up a token's pairs in fp32, by their routing weights.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.axes import RowAxes
from regraft.codegen.rowwise.expand import Calls
from regraft.codegen.triton.attention_configs import ARCHS
from regraft.codegen.triton.emit import (
    POINTER_KINDS,
    Entry,
    Kernel,
    Origin,
    Parameter,
    digest,
    dtype_name,
    header,
    render,
)
from regraft.codegen.triton.gemm.configs import few_configs, product_configs
from regraft.codegen.triton.gemm.experts_spec import ExpertsSpec
from regraft.codegen.triton.rowwise.columns import Span
from regraft.codegen.triton.rowwise.device import DeviceText
from regraft.codegen.triton.rowwise.helpers import helper_text
from regraft.codegen.triton.rowwise.reference import reference_lines

aten = torch.ops.aten
_NAME = "experts"
_TITLE = "Routed experts: pairs of tokens and experts sorted by expert, two grouped products, a sum over each token's."
_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
#: Up to this many pairs an expert has in the mean, its weights are the traffic: small tiles of rows.
FEW_PAIRS = 16
_COMBINE = dict.fromkeys(ARCHS, (1024, 4, 1))


def emit_experts(spec: ExpertsSpec, origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernels of a spec in one file."""
    graph = _gate_graph(spec)
    device = _GateText(graph)
    gate_lines = device.lines()
    count = len(spec.parts)
    many, few = product_configs(spec.dtype, 2, False), few_configs(spec.dtype, 2)
    parameters = {"first": _product_parameters(spec, "first"), "down": _product_parameters(spec, "down")}
    body = render(
        "experts.py.j2",
        name=f"{_NAME}_@",
        spec=spec,
        configs=many,
        few=few,
        few_pairs=FEW_PAIRS,
        rounds=sorted({dtype_name(kind) for kind in device.body.rounds}),
        helpers=helper_text(device.body.helpers),
        gate_lines=gate_lines[:-1],
        gate_value=gate_lines[-1],
        gate_reference=reference_lines(graph),
        accumulators=[f"acc_{number}" for number in range(count)],
        element=dtype_name(spec.dtype),
        precision=', input_precision="ieee"' if spec.dtype == torch.float32 else "",
        weights=list(dict.fromkeys(name for name, _, _ in spec.parts)),
        kernel_arguments={name: [parameter.name for parameter in held] for name, held in parameters.items()},
        parameters=[f"{name}: Tensor" for name in spec.operands],
        arguments=list(spec.operands),
        far=_far(spec),
        part_text=partial(_part_text, spec),
        launch_values=lambda kind: [_launch_value(spec, parameter.name) for parameter in parameters[kind]],
        common=torch.promote_types(spec.dtype, spec.routing),
        combine=_COMBINE["sm_80"],
    )
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    name = f"{_NAME}_{digest(body, 8)}"
    source = header(_TITLE, _facts(spec), origins) + body.replace(f"{_NAME}_@", name)
    entries = [
        Entry(f"{name}_{kind}", parameters[kind], _TILES, table) for kind in ("first", "down") for table in (many, few)
    ]
    entries.append(Entry(f"{name}_combine", _combine_parameters(spec), ("BLOCK_COLUMNS",), _COMBINE))
    return Kernel(name, source, tuple(entries), spec.operands)


def _part_text(spec: ExpertsSpec, weight: str, offset: int, step: int) -> str:
    """The columns of gate or up in the reference."""
    if spec.layout in ("separate", "single"):
        return f"{weight}_rows"
    if step != 1:
        return f"{weight}_rows[:, {offset}::{step}]"
    return f"{weight}_rows[:, {offset}:]" if offset else f"{weight}_rows[:, :{spec.intermediate}]"


def _far(spec: ExpertsSpec) -> list[str]:
    """How far the last number along a summed dim lies from the first, of each tensor: a tile's places are 32-bit."""
    weights = dict.fromkeys([*(name for name, _, _ in spec.parts), "down"])
    dim = 1 if spec.transposed else 2
    return [f"hidden.stride(1) * {spec.hidden}", *(f"{name}.stride({dim}) * {name}.shape[{dim}]" for name in weights)]


def _launch_value(spec: ExpertsSpec, name: str) -> str:
    """What the launcher gives for a kernel's parameter."""
    if name == "tiles":
        return "tile_table"
    tensor, stride, what = name.partition("_stride_")
    if not stride:
        return name
    places = {"row": 0, "column": 1, "expert": 0, "out": 1, "in": 2}
    if spec.transposed and not tensor.endswith("_bias"):
        places |= {"out": 2, "in": 1}
    return f"{tensor}.stride({places[what]})"


def _facts(spec: ExpertsSpec) -> dict[str, str]:
    sizes = f"{spec.experts} experts, hidden {spec.hidden}, intermediate {spec.intermediate}"
    limit = "" if spec.limit is None else f", limit {spec.limit}"
    return {
        "element": f"{dtype_name(spec.dtype)}, routed in {dtype_name(spec.routing)}",
        "sizes": sizes,
        "gate": f"{spec.activation}, {spec.layout}{limit}{f', up + {spec.up_offset}' if spec.up_offset else ''}",
    }


def _product_parameters(spec: ExpertsSpec, kind: str) -> tuple[Parameter, ...]:
    """Parameters of one of the grouped products, in order."""
    element = POINTER_KINDS[spec.dtype]
    source, target = ("hidden", "inner") if kind == "first" else ("inner", "parts")
    weights = ("down",) if kind == "down" else tuple(dict.fromkeys(name for name, _, _ in spec.parts))
    biases = tuple(f"{name}_bias" for name in weights if getattr(spec, f"{name}_bias"))
    summed = spec.hidden if kind == "first" else spec.intermediate
    even = summed % 16 == 0
    found = [Parameter(source, element, aligned=True)]
    found += [Parameter(name, "*i32", aligned=True) for name in ("order", "tiles")]
    found += [Parameter(name, element, aligned=True) for name in (*weights, *biases, target)]
    found += [Parameter("tile_count", "i32")]
    found += [Parameter("top_k", "i32"), Parameter("hidden_stride_row", "i32", aligned=even)] if kind == "first" else []
    found += [Parameter("hidden_stride_column", "i32", 1)] if kind == "first" else []
    for name in weights:
        out, summed_stride = (1, None) if spec.transposed else (None, 1)
        found += [
            Parameter(f"{name}_stride_expert", "i64", aligned=even),
            Parameter(f"{name}_stride_out", "i32", out, aligned=even),
            Parameter(f"{name}_stride_in", "i32", summed_stride, aligned=even),
        ]
    for name in biases:
        found += [Parameter(f"{name}_stride_expert", "i32", aligned=even), Parameter(f"{name}_stride_out", "i32", 1)]
    return tuple(found)


def _combine_parameters(spec: ExpertsSpec) -> tuple[Parameter, ...]:
    common = torch.promote_types(spec.dtype, spec.routing)
    pointers = {
        "parts": POINTER_KINDS[spec.dtype],
        "index": "*i64",
        "weight": POINTER_KINDS[spec.routing],
        "out": POINTER_KINDS[common],
    }
    strides = ("index_stride_token", "index_stride_slot", "weight_stride_token", "weight_stride_slot")
    return (
        *(Parameter(name, kind, aligned=True) for name, kind in pointers.items()),
        *(Parameter(name, "i32") for name in ("top_k", *strides)),
    )


def _gate_graph(spec: ExpertsSpec) -> fx.Graph:
    """What an expert does between its products, as a small graph of ``gate`` and ``up`` (``ir/ops/moe.py``)."""
    graph, mode = fx.Graph(), FakeTensorMode()
    values = []
    for name in ("gate", "up")[: len(spec.parts)]:
        node = graph.placeholder(name)
        with mode:
            held: Tensor = torch.empty((2, spec.intermediate), dtype=spec.dtype)
        node.meta["val"] = held
        values.append(node)
    end = graph.output(())
    build = Calls(graph, end, mode)
    gate, up = values[0], values[1] if spec.gated else None
    if spec.limit is not None:
        gate = build.call(aten.clamp.default, gate, None, spec.limit)
        up = None if up is None else build.call(aten.clamp.default, up, -spec.limit, spec.limit)
    if spec.activation == "swish":
        opened = build.call(aten.sigmoid.default, build.call(aten.mul.Tensor, gate, spec.alpha))
        made = build.call(aten.mul.Tensor, gate, opened)
    else:
        made = build.activate(gate, spec.activation)
    if up is not None:
        shifted = build.call(aten.add.Tensor, up, spec.up_offset) if spec.up_offset else up
        made = build.call(aten.mul.Tensor, made, shifted)
    elif made is gate:  # nothing happens: still a call, so that there is something to write
        made = build.call(aten.alias.default, gate)
    end.args = ((made,),)
    return graph


class _GateText(DeviceText):
    """The statements of a gate function on tiles that are called as its inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        calls = [node for node in graph.nodes if node.op == "call_function"]
        super().__init__(graph, RowAxes.of(calls), {}, chunked=False, reserved=("gate", "up", "inner", "operand"))

    def lines(self) -> list[str]:
        """Statements without indentation; the last is the name of the result."""
        results = self.graph.output_node().args[0]
        assert isinstance(results, tuple) and isinstance(results[0], fx.Node)
        name = self._value(results[0], self.spans[results[0]][0])
        return [*(line.strip() for line in self.body.lines), name]

    def _loaded(self, node: fx.Node, span: Span | None, reader: fx.Node | None) -> str:
        return node.name
