"""Lowering a program to a GPU: attention, routed experts and row-wise regions become emitted kernels, each in a file of
its own; the rest runs as PyTorch has it, semantic operators as their references.

On CPU tensors the lowered graph runs too: the operator of a kernel is its definition there. So a program is lowered,
checked and saved for a GPU on a machine without one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.executable import Executable
from regraft.codegen.triton.attention_lower import AttentionPlan, Choice, refused_text
from regraft.codegen.triton.attention_site import OPERATORS
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.gemm.lower import lower_kernels
from regraft.codegen.triton.tuner import KernelTuner
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import user_line
from regraft.ir.program import Program
from regraft.ir.records import Application, Log, Refusal

_RULE, _PASS = "attention-kernel", "lowering"

#: A lowering of one node to a node of the new graph.
Lowering = Callable[[Context, fx.Node], fx.Node]


class KernelExecutable(Executable):
    """A lowered program with the kernels that it calls, what was chosen for each attention, and what to tell about
    that choice as ``notes``."""

    def __init__(
        self,
        module: fx.GraphModule,
        tuning: bytes,
        kernels: tuple[Kernel, ...],
        choices: tuple[Choice, ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(module, tuning)
        self.kernels, self.choices, self.notes = kernels, choices, notes


def lower(program: Program, log: Log | None = None, tuner: KernelTuner | None = None) -> KernelExecutable:
    """The program as an executable for a GPU; ``log`` is told which sites have a kernel, and why others have none.
    ``tuner`` decides between kernels, PyTorch's attention and FlexAttention; without one, kernels run."""
    tuner = tuner or KernelTuner()
    program = program.copy()  # regions are replaced in place
    regions = lower_kernels(program)
    attention = AttentionPlan.of(program, tuner)
    lowerings: dict[Any, Lowering] = dict.fromkeys(OPERATORS, attention.lower)
    context = Context(torch.nn.Module(), fx.Graph(), program=program)
    for node in program.user_inputs():
        context.values[node] = Lowered(full=context.graph.placeholder(node.name))
    for node in program.graph.nodes:
        if node.op == "call_function":
            made = lowerings.get(node.target, _as_it_is)(context, node)
            made.meta.update(copy.copy(node.meta), source=node.name)
            context.values[node] = Lowered(full=made)
    context.graph.output(fx.map_arg(program.output_node.args[0], context.value))
    choices = tuple(attention.choices.values())
    if log is not None:
        _tell(log, choices)
        regions.tell(log)
    module = fx.GraphModule(context.root, context.graph)
    kernels = (*attention.kernels.values(), *regions.kernels.values())
    notes = tuner.notes(sum(choice.record is None for choice in choices))
    return KernelExecutable(module, tuner.to_lines(), kernels, choices, notes)


def _as_it_is(context: Context, node: fx.Node) -> fx.Node:
    args = fx.map_arg(node.args, context.value)
    kwargs = fx.map_arg(node.kwargs, context.value)
    return context.call(node.target, *args, **kwargs)


def _tell(log: Log, choices: tuple[Choice, ...]) -> None:
    """The report's rows of attention: a kernel is one more rewrite, compared with the whole at the end."""
    statistics = log.of(_RULE)
    for choice in choices:
        statistics.tried += 1
        where = user_line(choice.node)
        if choice.runs == "kernel":
            statistics.fired += 1
            number = len(log.applications) + 1
            names = (choice.node.name,), (choice.kernel,)
            log.applications.append(
                Application(_RULE, _PASS, Exactness.REASSOCIATED.value, number, *names, user_line=where)
            )
        else:
            statistics.refused += 1
            log.refusals.append(Refusal(_RULE, _PASS, "requirement", choice.node.name, refused_text(choice), where))
