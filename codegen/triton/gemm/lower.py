"""Putting the kernels of routed experts and of matrix products into a program's graph.

Experts always become kernels where there is one: otherwise their definition loops over them. Products do only on
request: whether a kernel with its regions beats the library's product beside a row-wise kernel is for the target to
measure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.operators import Kind, Step, is_free_view, step_of
from regraft.codegen.rowwise.partition import Left, Region, outputs_of
from regraft.codegen.triton.attention_part_lower import lower_parts
from regraft.codegen.triton.attention_scores_lower import lower_scores
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.gemm.configs import FEW_ROWS
from regraft.codegen.triton.gemm.emit import emit_product
from regraft.codegen.triton.gemm.experts import emit_experts
from regraft.codegen.triton.gemm.experts_spec import ExpertsSpec, experts_spec
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.lower import Placed, RegionReport, lower_regions, place_alike
from regraft.codegen.triton.tokens.lower import lower_tokens
from regraft.ir import ops
from regraft.ir.cost import footprint, node_cost
from regraft.ir.nodes import arguments, concrete, shape, user_line
from regraft.ir.program import Program

RULE = "grouped experts"


def lower_kernels(program: Program, products: bool = False) -> RegionReport:
    """Experts, token reduction, what reads attention's scores, parts of attention, products where asked for, and
    row-wise regions become kernels, in place."""
    report = RegionReport()
    lower_experts(program, report)
    lower_tokens(program, report)
    lower_scores(program, report)
    lower_parts(program, report)
    if products:
        lower_products(program, report)
    return lower_regions(program, report)


def lower_experts(program: Program, report: RegionReport) -> None:
    """Replace the routed experts of a program by their kernels; sites that are alike share one."""
    alike: dict[ExpertsSpec, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is ops.moe:
            try:
                alike.setdefault(experts_spec(node), []).append(node)
            except Unfusable as reason:
                report.left.append(Left(node.name, str(reason), user_line(node)))
    for spec, nodes in alike.items():
        kernel = emit_experts(spec, tuple(map(Origin.of, nodes)))
        report.kernels[kernel.name] = kernel
        for node in nodes:
            _place_experts(program, node, kernel)
            where = user_line(node)
            gain = f"{spec.experts} experts in two grouped products, instead of one by one"
            report.placed.append(Placed(kernel.name, (node.name,), gain, where))


def _place_experts(program: Program, node: fx.Node, kernel: Kernel) -> None:
    given = arguments(node)
    with program.graph.inserting_before(node):
        call = load_kernel(kernel).operator._opoverload
        made = program.graph.call_function(call, tuple(given[name] for name in kernel.operands))
    made.meta = {**node.meta, "provenance": (*node.meta.get("provenance", ()), RULE)}
    node.replace_all_uses_with(made)
    program.graph.erase_node(node)


def lower_products(program: Program, report: RegionReport) -> None:
    """Replace linear layers with what stands before and behind them by kernels; a layer by itself stays as it is."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    taken: set[fx.Node] = set()
    found = []
    for node in order:
        if not _is_linear(node) or node in taken:
            continue
        try:
            nodes = _grown(program, node, order, taken)
        except Unfusable as reason:
            report.left.append(Left(node.name, str(reason), user_line(node)))
            continue
        if len(nodes) == 1 and node.target is not ops.linear:
            report.left.append(Left(node.name, "a product by itself is the library's", user_line(node)))
            continue
        taken |= set(nodes)
        found.append(_region(nodes))
    place_alike(program, found, report, emit_product)


def _is_linear(node: fx.Node) -> bool:
    return node.target in (ops.linear, torch.ops.aten.linear.default)


def _grown(program: Program, linear: fx.Node, order: dict[fx.Node, int], taken: set[fx.Node]) -> list[fx.Node]:
    """A layer and its neighbours, as far as one kernel holds them; raises ``Unfusable`` where none holds the layer."""

    def held(nodes: set[fx.Node]) -> list[fx.Node]:
        listed = sorted(nodes, key=order.__getitem__)
        emit_product(listed, outputs_of(listed), program.fake_mode)
        return listed

    nodes = held({linear})
    while True:
        for more in _behind(nodes, linear, order):
            if more & taken:
                continue
            try:
                nodes = held({*nodes, *more})
            except Unfusable:
                continue
            break
        else:
            break
    pending = [arguments(linear)["x" if linear.target is ops.linear else "input"]]
    while pending and _rows(linear) <= FEW_ROWS:
        front = pending.pop()
        if front not in taken and _in_front(front, nodes):
            with contextlib.suppress(Unfusable):
                nodes = held({*nodes, front})
                pending += front.all_input_nodes
    return nodes


def _behind(nodes: Sequence[fx.Node], linear: fx.Node, order: dict[fx.Node, int]) -> Iterator[set[fx.Node]]:
    """Calls of one element that read a region, with the slices of it that they read; what else they read is there
    before the product, so that no path leaves the region and comes back."""
    inside = set(nodes)
    for node in nodes:
        for user in node.users:
            readers = list(user.users) if _cuts(user) else [user]
            for reader in readers:
                step = step_of(reader)
                if reader in inside or isinstance(step, str) or step.kind is not Kind.POINTWISE or is_free_view(reader):
                    continue
                slices = {n for n in step.tensors if _cuts(n) and n.args[0] in inside}
                if all(n in inside | slices or order[n] < order[linear] for n in step.tensors):
                    yield {reader, *slices}


def _cuts(node: fx.Node) -> bool:
    step = step_of(node)
    return isinstance(step, Step) and step.kind is Kind.COLUMNS and is_free_view(node)


def _in_front(node: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether a row-wise call computes what only the region reads."""
    step = step_of(node)
    if isinstance(step, str) or step.kind is Kind.PART or node.target is ops.add_norm:
        return False
    if is_free_view(node) and step.kind is not Kind.POINTWISE:
        return False
    return all(user in nodes for user in node.users)


def _rows(node: fx.Node) -> int:
    rows = 1
    for size in shape(node)[:-1]:
        rows *= concrete(size)
    return rows


def _region(nodes: Sequence[fx.Node]) -> Region:
    inside = set(nodes)
    outputs = outputs_of(nodes)
    inputs = {operand for node in nodes for operand in node.all_input_nodes if operand not in inside}
    after = sum(footprint(node.meta["val"]) for node in (*inputs, *outputs))
    return Region(tuple(nodes), tuple(outputs), sum(node_cost(node).bytes for node in nodes), after)
