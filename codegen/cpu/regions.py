"""Row programs in a lowered graph: which calls of a program become one, and in which order the rest follows."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.fused import RowProgram
from regraft.codegen.cpu.native.kernels import FUSED
from regraft.codegen.cpu.native_operators import fused_native
from regraft.codegen.cpu.row_instructions import refuse
from regraft.codegen.cpu.row_programs import compiled
from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.expand import expand
from regraft.codegen.rowwise.operators import is_free_view, step_of
from regraft.ir import ops
from regraft.ir.cost import footprint, node_cost
from regraft.ir.program import Program

_WORTH_IT = 0.02  # of the bytes that a program moves; less does not pay for building and loading the kernel
_STEPS = 6  # of an activation that has no operator of PyTorch, at most


@dataclass(frozen=True, eq=False)
class Region:
    """Calls that one row program stands for: it reads ``operands`` and makes the values of ``outputs``."""

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    program: RowProgram
    operands: tuple[fx.Node, ...]


def row_regions(program: Program) -> list[Region]:
    """The regions of a program; none where all of them together save little, or nothing can run them."""
    worth_it = _WORTH_IT * sum(node_cost(node).bytes for node in program.graph.nodes)
    if _most_saved(program) <= worth_it:
        return []
    from regraft.codegen.rowwise.partition import find_regions  # takes a while to import

    found, saved = [], 0.0
    for region in find_regions(program, refuse).regions:
        try:
            made, operands = compiled(expand(region.nodes, region.outputs, program.fake_mode))
        except Unfusable:
            continue
        found.append(Region(region.nodes, region.outputs, made, tuple(operands)))
        saved += region.bytes_before - region.bytes_after
    return [] if saved < worth_it or FUSED.missing() else found


def _most_saved(program: Program) -> float:
    """Bytes that all calls that could be in regions hand to one another: no regions save more."""
    held = {
        node
        for node in program.graph.nodes
        if node.op == "call_function" and not isinstance(step_of(node), str) and refuse(node) is None
    }
    moved = 0.0
    for node in held:
        readers = 0 if is_free_view(node) else sum(user in held for user in node.users)
        inside = _STEPS if node.target is ops.activation else 0  # of one element, each written and read
        moved += ((1 + readers if readers else 0) + inside) * footprint(node.meta["val"])
    return moved


def in_order(program: Program, regions: list[Region]) -> Iterator[fx.Node | Region]:
    """Calls outside regions, and regions, each behind what it reads."""
    region_of = {node: region for region in regions for node in region.nodes}
    done: set[fx.Node | Region] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and region_of.get(node, node) not in done:
            yield from _with_operands(region_of.get(node, node), region_of, done)


def _with_operands(
    first: fx.Node | Region, region_of: dict[fx.Node, Region], done: set[fx.Node | Region]
) -> Iterator[fx.Node | Region]:
    pending = [first]
    while pending:
        item = pending[-1]
        nodes = (item,) if isinstance(item, fx.Node) else item.nodes
        inside = set(nodes)
        operands = [source for node in nodes for source in node.all_input_nodes if source not in inside]
        steps = dict.fromkeys(region_of.get(source, source) for source in operands if source.op == "call_function")
        waits = [step for step in steps if step not in done]
        if waits:
            pending += reversed(waits)
            continue
        pending.pop()
        if item not in done:
            done.add(item)
            yield item


def lower_region(context: Context, region: Region) -> dict[fx.Node, Lowered]:
    """The call of a region's program, and its results."""
    hint = region.nodes[-1].name
    call = context.call(
        fused_native, context.bind(region.program, f"{hint}_program"), *map(context.value, region.operands)
    )
    if len(region.outputs) == 1:
        return {region.outputs[0]: Lowered(full=call)}
    return {
        output: Lowered(full=context.call(operator.getitem, call, number))
        for number, output in enumerate(region.outputs)
    }
