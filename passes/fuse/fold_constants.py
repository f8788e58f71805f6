"""Constant folding: what depends on no input (position tables, masks that stayed tensors) is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.driver import Session
from regraft.ir.nodes import is_random, is_tensor, user_line
from regraft.ir.probe import Pool, Probe
from regraft.ir.program import Program
from regraft.ir.records import Application
from regraft.passes.base import Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes that no input reaches by stored tensors of at most ``largest_bytes`` each.

    What is made of parameters (a position embedding's rows) is stored only up to ``largest_parameter_bytes``: a second
    copy of large weights would cost more than it saves.
    """

    largest_bytes: int = 64 << 20
    largest_parameter_bytes: int = 1 << 20

    def run(self, program: Program, session: Session) -> int:
        constant = _constant_nodes(program)
        wanted = self._worth_storing(constant)
        if session.fuel.left is not None:
            wanted = wanted[: max(session.fuel.left, 0)]
        if not wanted:
            return 0
        probe = Probe(program, (), Pool(), program.example)
        for node, value in zip(wanted, probe.evaluate(wanted), strict=True):
            self._replace(program, session, node, value)
        return len(wanted)

    def _worth_storing(self, constant: dict[fx.Node, bool]) -> list[fx.Node]:
        """Constants that are read by what is no constant, or by one that is too large to be stored."""
        stored, computed = list[fx.Node](), set[fx.Node]()
        for node, of_parameters in reversed(constant.items()):
            if all(user in constant and user not in computed for user in node.users):
                continue
            (stored.append if self._fits(node, of_parameters) else computed.add)(node)
        return stored[::-1]

    def _fits(self, node: fx.Node, of_parameters: bool) -> bool:
        if not is_tensor(node):
            return False
        value = node.meta["val"]
        limit = self.largest_parameter_bytes if of_parameters else self.largest_bytes
        return bool(value.numel() * value.element_size() <= limit)

    def _replace(self, program: Program, session: Session, node: fx.Node, value: torch.Tensor) -> None:
        session.fuel.burn()
        session.applied += 1
        placeholder = program.add_constant(f"constant.{node.name}", value.clone(memory_format=torch.contiguous_format))
        session.log.applications.append(
            Application(
                rule=self.name,
                pass_name=self.name,
                exactness="bitwise",
                number=session.applied,
                source_nodes=(node.name,),
                new_nodes=(placeholder.name,),
                user_line=user_line(node),
                drift=0.0,
            )
        )
        node.replace_all_uses_with(placeholder, propagate_meta=False)


def _constant_nodes(program: Program) -> dict[fx.Node, bool]:
    """Deterministic calls that read no user input, directly or through others, in graph order; whether each is made
    of parameters."""
    mutated = set(program.mutated().values())
    constant: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if is_random(node) or not _is_static(node.meta.get("val")):
            continue
        sources = node.all_input_nodes
        if all(source in constant or _is_fixed(program, source, mutated) for source in sources):
            constant[node] = any(constant.get(source, False) or _is_parameter(program, source) for source in sources)
    return constant


def _is_fixed(program: Program, node: fx.Node, mutated: set[str]) -> bool:
    name = program.weight_name(node)
    return name is not None and name not in mutated


def _is_parameter(program: Program, node: fx.Node) -> bool:
    return program.weight_name(node) in program.parameters()


def _is_static(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)
