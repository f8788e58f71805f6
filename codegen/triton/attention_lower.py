"""Which attention of a program becomes an emitted kernel, and what runs where none does.

A site is refused with the reason where no kernel was tested for it: its element type, head_dim, mask or bounds.
PyTorch's attention runs such a site where it can express it, else the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.attention_sdpa import lower_reference, lower_sdpa, sdpa_can
from regraft.codegen.cpu.context import Context
from regraft.codegen.triton.attention_decode import emit_decode
from regraft.codegen.triton.attention_layout import KeyLayout
from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported, site_spec
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.load import load_kernel
from regraft.ir import ops
from regraft.ir.nodes import arguments, concrete, shape

#: Queries, and rows of queries and heads that share keys, up to which the keys are divided among programs.
MOST_DECODED_QUERIES, MOST_DECODED_ROWS = 16, 128
_DECODE = KeyLayout(packs_heads=True)
#: The operators that kernels are emitted for.
OPERATORS = (ops.attention, ops.attention_mapped)


@dataclass(frozen=True)
class Choice:
    """What runs a site: ``runs`` is "kernel", with its name, or "sdpa" or "reference" with the reason against one."""

    node: fx.Node
    runs: str
    kernel: str = ""
    reason: str = ""


@dataclass(frozen=True)
class AttentionPlan:
    """The choices for a program, and the kernels that they name: one for all sites that ask for the same."""

    choices: dict[fx.Node, Choice]
    kernels: dict[str, Kernel]

    @staticmethod
    def of(graph: fx.Graph) -> AttentionPlan:
        """Decide every attention of a graph; emits, and builds nothing."""
        asked: dict[tuple[AttentionSpec, bool], list[fx.Node]] = {}
        choices: dict[fx.Node, Choice] = {}
        for node in graph.nodes:
            if node.target not in OPERATORS:
                continue
            given = arguments(node)
            try:
                spec = site_spec(given)
            except Unsupported as refusal:
                runs = "sdpa" if _sdpa_runs(node, given) else "reference"
                choices[node] = Choice(node, runs, reason=str(refusal))
            else:
                asked.setdefault((spec, is_decode(given, spec)), []).append(node)
        kernels: dict[str, Kernel] = {}
        for (spec, decode), nodes in asked.items():
            origins = tuple(Origin.of(node) for node in nodes)
            kernel = emit_decode(spec, origins=origins) if decode else emit_prefill(spec, origins)
            kernels[kernel.name] = kernel
            choices |= {node: Choice(node, "kernel", kernel.name) for node in nodes}
        return AttentionPlan(choices, kernels)

    def lower(self, context: Context, node: fx.Node) -> fx.Node:
        """Emit one site into the lowered graph."""
        choice, given = self.choices[node], arguments(node)
        if choice.runs == "sdpa":
            return lower_sdpa(context, given)
        if choice.runs == "reference":
            return _call_definition(context, node, given)
        kernel = self.kernels[choice.kernel]
        return context.call(operator_of(kernel), *(_operand(context, given, name) for name in kernel.operands))


def _sdpa_runs(node: fx.Node, given: dict[str, Any]) -> bool:
    return node.target is ops.attention and sdpa_can(given) and given["sinks"] is None


def _call_definition(context: Context, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    if node.target is ops.attention:
        return lower_reference(context, given)
    args, kwargs = fx.map_arg(node.args, context.value), fx.map_arg(node.kwargs, context.value)
    return context.call(node.target, *args, **kwargs)


def is_decode(given: dict[str, Any], spec: AttentionSpec) -> bool:
    """Whether a site has few queries and more keys; both kernels are right for any number."""
    queries, keys = concrete(shape(given["query"])[2]), concrete(shape(given["key"])[2])
    group = concrete(shape(given["query"])[1]) // max(1, concrete(shape(given["key"])[1]))
    few = queries <= MOST_DECODED_QUERIES and queries * group <= MOST_DECODED_ROWS
    return few and keys > queries and _DECODE.refuses(spec) is None


def operator_of(kernel: Kernel) -> Any:
    """The operator that an emitted file registers, as graphs name it."""
    load_kernel(kernel)
    return getattr(torch.ops.regraft_kernels, kernel.name).default


def _operand(context: Context, given: dict[str, Any], name: str) -> Any:
    if name.startswith("mask_"):
        return context.value(given["mask_tensors"][int(name.removeprefix("mask_"))])
    value = given[name]
    return context.value(value) if isinstance(value, fx.Node) else float(value)


def refused_text(choice: Choice) -> str:
    """A refusal for the report: why no kernel, and what runs instead."""
    instead = "PyTorch's attention" if choice.runs == "sdpa" else "the definition"
    return f"no kernel: {choice.reason}; {instead} runs"
