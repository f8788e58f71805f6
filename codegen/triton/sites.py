"""Putting the kernels of an operator into a program's graph: sites that are alike share one, others say why not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.partition import Left
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.lower import Placed, RegionReport
from regraft.ir.nodes import user_line
from regraft.ir.program import Program


class Sites(ABC):
    """The sites of one operator. Those of one key have the same kernel. ``rule`` is what reports call the rewrite,
    ``gain`` what it is for."""

    rule = ""
    gain = ""

    def __init__(self, program: Program, report: RegionReport) -> None:
        self.program, self.report = program, report

    def run(self, nodes: list[fx.Node]) -> None:
        """Replace what has a kernel, and say of the rest why not."""
        alike: dict[Any, list[fx.Node]] = {}
        for node in nodes:
            try:
                alike.setdefault(self.key(node), []).append(node)
            except Unfusable as reason:
                self.report.left.append(Left(node.name, str(reason), user_line(node)))
        for key, group in alike.items():
            origins = tuple(Origin.of(member) for node in group for member in self.members(node))
            kernel = self.emit(key, group[0], origins)
            self.report.kernels[kernel.name] = kernel
            for node in group:
                names = tuple(member.name for member in self.members(node))
                self.report.placed.append(Placed(kernel.name, names, self.gain, user_line(node)))
                self.place(node, kernel)

    @abstractmethod
    def key(self, node: fx.Node) -> Any:
        """What the text of a site's kernel depends on."""

    @abstractmethod
    def emit(self, key: Any, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        """The kernel of sites that are alike, of which ``node`` is one."""

    def members(self, node: fx.Node) -> list[fx.Node]:
        """The calls that the kernel of a site stands for."""
        return [node]

    @abstractmethod
    def place(self, node: fx.Node, kernel: Kernel) -> None:
        """Put the kernel's call in the place of a site."""

    def call(self, before: fx.Node, kernel: Kernel, args: tuple[Any, ...], value: Any) -> fx.Node:
        """A call of a kernel."""
        target: Callable[..., Any] = load_kernel(kernel).operator._opoverload
        with self.program.graph.inserting_before(before):
            made = self.program.graph.call_function(target, args)
        made.meta = {**before.meta, "val": value, "provenance": (*before.meta.get("provenance", ()), self.rule)}
        return made

    def replace(self, node: fx.Node, made: fx.Node) -> None:
        """Let whoever reads ``node`` read ``made``."""
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)
