"""Negated views written out: kernels read memory, where the sign of such a view is not.

``z.conj().imag`` is a view of ``z``'s memory with a bit that says "negated", which PyTorch's own operators respect.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder
from regraft.ir.program import Program


def write_out_negated(program: Program) -> None:
    """Put ``resolve_neg`` between each such view and the calls that read it, in place."""
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    for node in list(program.graph.nodes):
        readers = [user for user in node.users if user.op != "output"]
        if not _is_negated(node.meta.get("val")) or not readers:
            continue
        if node.op == "call_function":
            node.meta["val"] = _value(node, program)
            if not _is_negated(node.meta["val"]):
                continue  # a view of what was written out
        before = first if node.op == "placeholder" else node.next
        build = Builder(program.graph, before, program.fake_mode, partial(dict, node.meta))
        written = build.call(torch.ops.aten.resolve_neg.default, node)
        for user in readers:
            user.replace_input_with(node, written)


def _is_negated(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_neg()


def _value(node: fx.Node, program: Program) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with program.fake_mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
