"""How far a compiled model's outputs may lie from the original's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import dtype, is_tensor, is_view
from regraft.ir.program import Program

#: Largest relative L2 error of outputs, by the coarsest element type that a model computes in.
BY_TYPE: dict[torch.dtype, float] = {
    torch.complex128: 1e-10,
    torch.float64: 1e-10,
    torch.complex64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}


def tolerance(program: Program, outputs: Iterable[Any]) -> float:
    """The largest relative L2 error that ``outputs`` of a captured program may have.

    Their element type alone would not do: logits that a model in bf16 returns in fp32 are as coarse as bf16. What is
    computed from weights alone does not count: its rounding is the same in both. Outputs without a fraction must be
    equal.
    """
    given = {value.dtype for value in outputs if isinstance(value, Tensor) and value.dtype in BY_TYPE}
    if not given:
        return 0.0
    computed = {dtype(node) for node in _reached(program) if _rounds(node)}
    return max(BY_TYPE[kind] for kind in given | computed)


def _reached(program: Program) -> set[fx.Node]:
    """The user's inputs, and all that is computed from their numbers."""
    found = set(program.user_inputs())
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.sym_size.int and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _rounds(node: fx.Node) -> bool:
    """Whether a call computes in a floating type and gives it: a cast or a constant is no coarser than what made it."""
    if node.op != "call_function" or not is_tensor(node) or is_view(node) or dtype(node) not in BY_TYPE:
        return False
    return any(is_tensor(operand) and dtype(operand) == dtype(node) for operand in node.all_input_nodes)
