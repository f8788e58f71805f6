"""Putting the kernels of row-wise regions into a program's graph.

Each region becomes one call of its emitted operator: on the CPU that runs the region's definition, on a GPU its kernel.
Regions that are the same computation share a kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.partition import Left, Region, find_regions
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.emit import RegionKernel, emit_region, memory_order
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import arguments, is_tensor, user_line
from regraft.ir.program import Program
from regraft.ir.records import Application, Log, Refusal

RULE = "row-wise region"
_LOGGED, _PASS = "region-kernel", "lowering"
Emit = Callable[[Sequence[fx.Node], Sequence[fx.Node], FakeTensorMode, tuple[Origin, ...]], RegionKernel]


@dataclass(frozen=True)
class Placed:
    """A region that became a kernel: the nodes that it stands for, and why it pays."""

    kernel: str
    nodes: tuple[str, ...]
    reason: str
    user_line: str


@dataclass
class RegionReport:
    """What became kernels, what stayed as it is and why, and the kernels by name."""

    placed: list[Placed] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def tell(self, log: Log) -> None:
        """Enter the sites into a program's log: a kernel is one more rewrite, compared with the whole at the end."""
        statistics = log.of(_LOGGED)
        statistics.tried += len(self.placed) + len(self.left)
        statistics.fired += len(self.placed)
        statistics.refused += len(self.left)
        for site in self.placed:
            number, kind = len(log.applications) + 1, Exactness.REASSOCIATED.value
            log.applications.append(
                Application(_LOGGED, _PASS, kind, number, site.nodes, (site.kernel,), user_line=site.user_line)
            )
        for item in self.left:
            log.refusals.append(Refusal(_LOGGED, _PASS, "requirement", item.node, item.reason, item.user_line))


def lower_regions(program: Program, report: RegionReport | None = None) -> RegionReport:
    """Replace the row-wise regions of a program, in place, by calls of their kernels."""
    report = report or RegionReport()
    found = find_regions(program)
    report.left += found.left
    place_alike(program, found.regions, report, emit_region)
    return report


def place_alike(program: Program, regions: Sequence[Region], report: RegionReport, emit: Emit) -> None:
    """Put kernels in the place of regions; those that are the same computation share one."""
    alike: dict[Any, list[Region]] = {}
    for region in regions:
        alike.setdefault(structure(region), []).append(region)
    for group in alike.values():
        origins = tuple(Origin.of(node) for region in group for node in region.nodes)
        try:
            first = emit(group[0].nodes, group[0].outputs, program.fake_mode, origins)
        except Unfusable as reason:
            report.left += [Left(n.name, str(reason), user_line(n)) for region in group for n in region.nodes]
            continue
        report.kernels[first.kernel.name] = first.kernel
        places = [reads(group[0]).index(node) for node in first.inputs]
        for region in group:
            held = reads(region)
            report.placed.append(_place(program, region, first, [held[place] for place in places]))
    _sort(program)
    program.module.recompile()


def _place(program: Program, region: Region, made: RegionKernel, inputs: list[fx.Node]) -> Placed:
    call: Callable[..., Any] = load_kernel(made.kernel).operator._opoverload
    last = region.nodes[-1]
    graph = program.graph
    meta = {key: value for key, value in last.meta.items() if key != "val"}
    rules = dict.fromkeys(rule for node in region.nodes for rule in node.meta.get("provenance", ()))
    meta["provenance"] = (*rules, RULE)
    values = tuple(node.meta["val"] for node in region.outputs)
    with graph.inserting_before(program.output_node):
        node = graph.call_function(call, tuple(inputs))
        node.meta = {**meta, "val": values[0] if len(values) == 1 else values}
        for place, output in enumerate(region.outputs):
            part = node
            if len(values) > 1:
                part = graph.call_function(operator.getitem, (node, place))
                part.meta = {**meta, "val": values[place]}
            output.replace_all_uses_with(part)
    names = tuple(member.name for member in region.nodes)
    for member in reversed(region.nodes):
        graph.erase_node(member)
    return Placed(made.kernel.name, names, region.reason, user_line(node))


def _sort(program: Program) -> None:
    """Every call behind what it reads, otherwise in the order that was."""
    paths: nx.DiGraph = nx.DiGraph()
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    paths.add_nodes_from(places)
    paths.add_edges_from((operand, node) for node in places for operand in node.all_input_nodes)
    for node in nx.lexicographical_topological_sort(paths, key=places.__getitem__):
        if node.op not in ("placeholder", "output"):
            program.output_node.prepend(node)


def reads(region: Region) -> list[fx.Node]:
    """The tensors that a region reads, in the order of its calls and their arguments."""
    inside = set(region.nodes)
    found: dict[fx.Node, None] = {}
    for node in region.nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and is_tensor(operand):
                found[operand] = None
    return list(found)


def structure(region: Region) -> tuple[Any, ...]:
    """What a region computes, the same for regions that one kernel serves: calls, sizes, types, memory of results."""
    numbers = {node: number for number, node in enumerate((*reads(region), *region.nodes))}

    def described(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value not in numbers:
                return str(value.meta.get("val"))
            return numbers[value], _kind(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(described, value))
        return repr(value)

    calls = tuple(
        (str(node.target), tuple((name, described(value)) for name, value in arguments(node).items()), _kind(node))
        for node in region.nodes
    )
    return calls, tuple((numbers[node], memory_order(node)) for node in region.outputs)


def _kind(node: fx.Node) -> Any:
    value = node.meta["val"]
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return tuple((part.dtype, tuple(map(str, part.shape))) for part in parts)
