"""Whole-graph clean-up: assertions about facts of the graph, common subexpressions, dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.driver import Session
from regraft.ir.nodes import has_effects
from regraft.ir.program import Program
from regraft.passes.base import Pass

aten = torch.ops.aten

# PyTorch knows that an assertion with a message has an effect; one without is no dead code either.
fx.node.has_side_effect(aten._assert_async.default)


@dataclass(frozen=True)
class DropAssertions(Pass):
    """Remove assertions on element type and device: they state what the captured graph already fixes."""

    def run(self, program: Program, session: Session) -> int:
        removed = 0
        for node in list(program.graph.nodes):
            if node.target is aten._assert_tensor_metadata.default:
                program.graph.erase_node(node)
                removed += 1
        return removed


@dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Calls with the same operator and arguments are one call."""

    def run(self, program: Program, session: Session) -> int:
        seen: dict[Any, fx.Node] = {}
        merged = 0
        for node in list(program.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            if key in seen:
                node.replace_all_uses_with(seen[key], propagate_meta=False)
                program.graph.erase_node(node)
                merged += 1
            else:
                seen[key] = node
        return merged


@dataclass(frozen=True)
class DropDeadCode(Pass):
    """Remove calls that nothing reads, and weights that no call reads."""

    def run(self, program: Program, session: Session) -> int:
        before = len(program.graph.nodes)
        program.graph.eliminate_dead_code(has_effects)
        program.drop_unused_weights()
        return before - len(program.graph.nodes)


def _key(node: fx.Node) -> Any:
    if node.op != "call_function" or has_effects(node):
        return None
    try:
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    exact = repr(value) if isinstance(value, (float, complex)) else value  # 0.0 == -0.0, which divide differently
    return (type(value), exact)  # 1, 1.0 and True are different arguments
