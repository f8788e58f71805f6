"""Outputs share memory with what they share it with in the original, and with nothing else.

Rewrites drop copies (``x.clone()`` becomes ``x``) and merge equal values, which changes no number but what a write of
the caller reaches: the compiled code's own constants, an input, another output. Where the rewritten graph shares more
than the captured one, a copy is put in front of the output. So it is where an output that was contiguous is a part of
a wider tensor now, as of merged linear layers: a caller may ask for views that only the former has.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument

from regraft.ir.nodes import Builder, is_tensor, is_view, size_equal
from regraft.ir.program import Program

_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def separate_outputs(program: Program, before: Program) -> int:
    """Insert the copies that outputs of ``program`` need, in place; ``before`` is the program as it was captured.

    Returns how many. What the model mutates counts too: a new value, or an output, that is a view of memory which is
    about to be written gets a copy, because write-backs happen one after another.
    """
    results = list(program.output_node.args[0])  # type: ignore[arg-type]
    captured: Any = before.output_node.args[0]
    earlier = [_root(value) for value in captured]
    written = _written(program)
    users = set(program.user_inputs())
    copies: dict[int, fx.Node] = {}
    owners: dict[Any, int] = {}  # root -> the first user output that is (a view of) it
    for position, (value, spec) in enumerate(zip(results, program.signature.output_specs, strict=True)):
        if not is_tensor(value):
            continue
        root = _root(value)
        if spec.kind in _MUTATIONS:
            needed = root[0] in written and spec.target != written[root[0]]
        else:
            first = owners.setdefault(root, position)
            needed = (
                root[0] in written
                or _is_fixed(root[0], users)
                or (root[0] in users and _name(earlier[position]) != _name(root))
                or (first != position and earlier[position] != earlier[first])
                or (_overlaps(value) and not _overlaps(captured[position]))
                or (_is_contiguous(captured[position]) and not _is_contiguous(value))
            )
        if needed:
            build = Builder(program.graph, program.output_node, program.fake_mode)
            layout = {"memory_format": torch.contiguous_format} if _is_contiguous(captured[position]) else {}
            copies[position] = build.call(torch.ops.aten.clone.default, value, **layout)
    _put(program, results, copies)
    return len(copies)


def _put(program: Program, results: list[Any], copies: dict[int, fx.Node]) -> None:
    if not copies:
        return
    for position, copy in copies.items():
        spec = program.signature.output_specs[position]
        results[position] = copy
        program.signature.output_specs[position] = OutputSpec(spec.kind, TensorArgument(copy.name), spec.target)
    program.output_node.args = (tuple(results),)


def _root(node: Any) -> tuple[Any, Any]:
    """The node that made the memory of a value, and which of its results it is."""
    index = None
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is operator.getitem:
            node, index = node.args
        elif is_view(node) and isinstance(node.args[0], fx.Node):
            node, index = node.args[0], None  # pieces of a split are views of one tensor
        else:
            break
    return node, index


def _name(root: tuple[Any, Any]) -> Any:
    return getattr(root[0], "name", None)  # inputs keep their names through all passes


def _written(program: Program) -> dict[fx.Node, str]:
    """Placeholders whose memory is written after a run -> the target of the mutation."""
    targets = {spec.target for spec in program.signature.output_specs if spec.kind in _MUTATIONS}
    buffers = {node: program.weight_name(node) for node in program.weight_placeholders()}
    inputs = {node: node.name for node in program.user_inputs()}
    return {node: name for node, name in {**buffers, **inputs}.items() if name is not None and name in targets}


def _overlaps(node: Any) -> bool:
    """Whether elements of a value share memory (it is expanded), so that nobody can write to it."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and any(isinstance(step, int) and step == 0 for step in value.stride())


def _is_contiguous(node: Any) -> bool:
    """Whether rows of a value follow each other without a gap, as far as symbolic sizes tell."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    expected: Any = 1
    for size, step in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size_equal(size, 1):
            continue
        if not size_equal(step, expected):
            return False
        expected = expected * size
    return True


def _is_fixed(root: Any, users: set[fx.Node]) -> bool:
    """Whether a value depends on no input, so that compiled code may hold it and return it again and again."""
    pending, seen = [root], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in users:
            return False
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return True
