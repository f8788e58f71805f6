"""Small programs for tests of the machinery: captured, or built node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.capture import capture
from regraft.ir.program import Program
from tests.support import AsModule


def program_of(function: Callable[..., Any], *args: Any, dynamic: Any = None) -> Program:
    """A function as captured: no rule has touched it."""
    return capture(AsModule(function).eval(), args, dynamic=dynamic)


def root_of(program: Program) -> fx.Node:
    """The node of the program's first output."""
    outputs: Any = program.output_node.args[0]
    root = outputs[0]
    assert isinstance(root, fx.Node)
    return root


def targets(program: Program) -> list[Any]:
    """Operators of all calls, in graph order."""
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def text(program: Program) -> list[str]:
    """Calls as short lines: ``mul = mul.Tensor(x, 0.5)``; placeholders by their names."""
    return [
        f"{node.name} = {short(node.target)}({', '.join(map(str, node.args))})"
        for node in program.graph.nodes
        if node.op == "call_function"
    ]


def short(target: Any) -> str:
    """``aten.mul.Tensor`` as ``mul.Tensor``."""
    return str(target).removeprefix("aten.").removesuffix(".default")


def numbers(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers that every run draws alike."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
