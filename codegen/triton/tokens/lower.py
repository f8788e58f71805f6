"""Putting the kernels of token reduction into a program's graph: plans, merges with what stands behind them, and tokens
put back."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.partition import Region
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.rowwise.lower import RegionReport, structure
from regraft.codegen.triton.sites import Sites
from regraft.codegen.triton.tokens.merge import MergeKernel, MergeSpec, emit_merge_tokens
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.plan_spec import PlanSpec, plan_spec
from regraft.codegen.triton.tokens.unmerge import UnmergeSpec, emit_unmerge
from regraft.ir import ops
from regraft.ir.nodes import arguments, dtype, is_call, shape
from regraft.ir.program import Program

aten = torch.ops.aten
RULE = "token kernel"
_NORMS = (aten.layer_norm.default, ops.rms_norm)


def lower_tokens(program: Program, report: RegionReport) -> None:
    """Replace plans, merges and tokens put back by their kernels, in place; sites that are alike share one."""
    for target, lowering in ((ops.plan_merge, _Plans), (ops.merge_tokens, _Merges), (ops.unmerge_tokens, _Unmerges)):
        lowering(program, report).run([node for node in program.graph.nodes if node.target is target])


class _Sites(Sites):
    rule = RULE


class _Plans(_Sites):
    gain = "a plan in one launch, without the matrix of similarities"

    def key(self, node: fx.Node) -> PlanSpec:
        return plan_spec(node)[0]

    def emit(self, key: PlanSpec, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_plan(key, origins)

    def members(self, node: fx.Node) -> list[fx.Node]:
        metric = arguments(node)["metric"]
        return [metric, node] if plan_spec(node)[0].heads else [node]

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        given, metric = plan_spec(node)[1], arguments(node)["metric"]
        args = tuple(given[name] for name in kernel.operands)
        self.replace(node, self.call(node, kernel, args, node.meta["val"]))
        if not metric.users:
            self.program.graph.erase_node(metric)


class _Merges(_Sites):
    gain = "a merge in one launch, in a fixed order"

    def key(self, node: fx.Node) -> tuple[MergeSpec, Any]:
        given = arguments(node)
        width = shape(given["x"])[2]
        if not isinstance(width, int):
            raise Unfusable(f"{node.name}: the width of the tokens is symbolic")
        if given["sizes"] is not None and dtype(given["sizes"]) != torch.float32:
            raise Unfusable(f"{node.name}: sizes are {dtype(given['sizes'])}")
        spec = MergeSpec(dtype(given["x"]), width, given["sizes"] is not None, _log_of(node) is not None)
        norm = self.norm(node)
        return spec, None if norm is None else structure(Region((norm,), (norm,), 0.0, 0.0))

    def norm(self, node: fx.Node) -> fx.Node | None:
        """The norm that reads the merged tokens, where the kernel holds it too."""
        merged = _part(node, 0)
        found = [user for user in merged.users if is_call(user, _NORMS)] if merged is not None else []
        if not found:
            return None
        spec = MergeSpec(dtype(found[0]), int(shape(found[0])[2]))
        try:
            emit_merge_tokens(spec, found[:1], merged, self.program.fake_mode)
        except Unfusable:
            return None
        return found[0]

    def made(self, node: fx.Node, spec: MergeSpec, origins: tuple[Origin, ...] = ()) -> MergeKernel:
        """The kernel of a site, with the weights that it reads there."""
        norm = self.norm(node)
        calls = () if norm is None else (norm,)
        return emit_merge_tokens(spec, calls, _part(node, 0), self.program.fake_mode, origins)

    def emit(self, key: tuple[MergeSpec, Any], node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return self.made(node, key[0], origins).kernel

    def members(self, node: fx.Node) -> list[fx.Node]:
        return [node, *(other for other in (_log_of(node), self.norm(node)) if other is not None)]

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        spec, _ = self.key(node)
        given = arguments(node)
        own = ["x", *(["sizes"] if spec.sizes else []), "kept", "sources", "slots"]
        inputs = self.made(node, spec).inputs
        logs, norm = _log_of(node), self.norm(node)
        further = [other for other in (logs, norm) if other is not None]
        values = tuple(node.meta["val"]) + tuple(other.meta["val"] for other in further)
        made = self.call(node, kernel, (*(given[name] for name in own), *inputs), values)
        for place, other in enumerate(further, start=2):
            with self.program.graph.inserting_after(made):
                part = self.program.graph.call_function(operator.getitem, (made, place))
            part.meta = {**other.meta}
            self.replace(other, part)
        self.replace(node, made)


class _Unmerges(_Sites):
    gain = "rows read once by index"

    def key(self, node: fx.Node) -> UnmergeSpec:
        x = arguments(node)["x"]
        width = shape(x)[2]
        if not isinstance(width, int):
            raise Unfusable(f"{node.name}: the width of the tokens is symbolic")
        return UnmergeSpec(dtype(x), width)

    def emit(self, key: UnmergeSpec, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_unmerge(key, origins)

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        given = arguments(node)
        self.replace(node, self.call(node, kernel, (given["x"], given["slots"]), node.meta["val"]))


def _part(node: fx.Node, place: int) -> fx.Node | None:
    """What takes one of the results of a call."""
    return next((user for user in node.users if is_call(user, (operator.getitem,)) and user.args[1] == place), None)


def _log_of(node: fx.Node) -> fx.Node | None:
    """The logarithm of the sizes that a merge makes."""
    sizes = _part(node, 1)
    return next((user for user in sizes.users if is_call(user, (aten.log.default,))), None) if sizes else None
