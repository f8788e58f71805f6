"""What a function looks like in canonical form, as text, beside the numbers that it must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from regraft.ir.program import Program
from tests.ir.graphs import short
from tests.support import captured, run


def form(program: Program) -> str:
    """Calls as text, each node by its place: ``0 = mul.Tensor(x0, 0.5)``; inputs are x, weights w."""
    names = {node: f"x{i}" for i, node in enumerate(program.user_inputs())}
    names |= {node: f"w{i}" for i, node in enumerate(program.weight_placeholders())}
    lines = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            names[node] = str(len(lines))
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: Name(names[n]))
            given = [*map(str, args), *(f"{name}={value}" for name, value in kwargs.items() if value is not None)]
            lines.append(f"{short(node.target)}({', '.join(given)})")
    return "; ".join(lines)


class Name(str):
    """A node's name, without quotes inside of lists."""

    def __repr__(self) -> str:
        return str(self)


def canonical(function: Callable[..., Any], *args: Tensor, dynamic: Any = None, tolerance: float = 0.0) -> str:
    """The canonical text of ``function``, after checking that it still computes the same on ``args``."""
    program = captured(function, args, dynamic=dynamic)
    results = zip(tree_leaves(run(program, args)), tree_leaves(function(*args)), strict=True)
    for result, expected in results:
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    return form(program)
