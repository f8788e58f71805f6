"""Runs of native calls in a lowered graph, made as one: what lies between two of them (views, Python) then costs
nothing.

A segment is recorded for the sizes and strides of its inputs: for the first that it sees, and for others when they come
a second time, because recording takes longer than a run that is never repeated. What is not or cannot be recorded (a
layout that a kernel has to copy first) runs call by call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native.tape import Recorder, Tape, Unrecordable
from regraft.codegen.cpu.native_operators import DESCRIPTIONS, fused_native, windows_native
from regraft.ir.nodes import is_view

_MOST_TAPES = 64
_MOST_SEEN = 256
_NEW = object()
_WORTH_IT = 2  # calls
_LONG = {fused_native, windows_native}  # calls whose description takes longer than a run of a few numbers

Value = Any


class Segment:
    """A piece of a lowered graph: a function of its inputs that returns a tuple of its outputs.

    ``graph`` has placeholders for the inputs, then for ``constants``.
    """

    def __init__(self, graph: fx.Graph, constants: Sequence[Value]) -> None:
        places = [node for node in graph.nodes if node.op == "placeholder"]
        self._inputs = places[: len(places) - len(constants)]
        self._constants = dict(zip(places[len(self._inputs) :], constants, strict=True))
        self._graph = graph
        self._one_by_one: Callable[..., tuple[Value, ...]] | None = None
        self._tapes: dict[Any, Tape | None] = {}
        self._seen: dict[Any, None] = {}

    def __call__(self, *inputs: Tensor | None) -> Sequence[Value]:
        key = tuple(None if x is None else (x.shape, x.stride(), x.storage_offset()) for x in inputs)
        tape: Any = self._tapes.get(key, _NEW)
        if tape is _NEW:
            tape = self._new(key, inputs)
        if tape is None:
            return self._run_one_by_one(inputs)
        return tape.run([x for x in inputs if x is not None])  # type: ignore[no-any-return]

    def _new(self, key: Any, inputs: Sequence[Tensor | None]) -> Tape | None:
        if self._tapes and key not in self._seen:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[key] = None
            return None
        if len(self._tapes) >= _MOST_TAPES:
            self._tapes.clear()
        tape = self._tapes[key] = self._recorded(inputs)
        return tape

    def _run_one_by_one(self, inputs: Sequence[Tensor | None]) -> Sequence[Value]:
        if self._one_by_one is None:
            self._one_by_one = fx.GraphModule(nn.Module(), self._graph).forward
        return self._one_by_one(*inputs, *self._constants.values())

    def _recorded(self, inputs: Sequence[Tensor | None]) -> Tape | None:
        try:
            return self._record(inputs)
        except (Unrecordable, RuntimeError):  # a view that this layout does not allow, too
            return None

    def _record(self, inputs: Sequence[Tensor | None]) -> Tape:
        values: dict[fx.Node, Value] = dict(self._constants)
        values |= {node: _without_values(x) for node, x in zip(self._inputs, inputs, strict=True)}
        recorder = Recorder(NATIVE.library(), [values[node] for node in self._inputs if values[node] is not None])
        for node in self._graph.nodes:
            if node.op == "call_function":
                values[node] = _record_node(recorder, node, values)
        returned = [values[node] for node in _outputs(self._graph)]
        if not all(recorder.holds(tensor) for tensor in returned):
            raise Unrecordable("an output that no kernel makes")
        return recorder.tape(returned)


def _record_node(recorder: Recorder, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    describe = DESCRIPTIONS.get(node.target)  # type: ignore[arg-type]
    if describe is not None:
        call = describe(*args, **kwargs)
        recorder.add(call, describe.native.library())
        return call.result
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(value, Tensor) and value.is_meta and not recorder.holds(value):
        raise Unrecordable(f"{node.name} copies")
    return value


def _without_values(x: Tensor | None) -> Tensor | None:
    """A meta tensor of ``x``'s sizes, strides and place in its memory."""
    if x is None:
        return None
    reach = x.storage_offset() + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.empty(max(reach, 0), dtype=x.dtype, device="meta").as_strided(x.shape, x.stride(), x.storage_offset())


def _outputs(graph: fx.Graph) -> Sequence[fx.Node]:
    found: Any = graph.output_node().args[0]
    return tuple(found)


def run_segment(segment: Segment, *inputs: Tensor | None) -> Sequence[Value]:
    """Call a segment; a lowered graph names functions."""
    return segment(*inputs)


def group(graph: fx.Graph, constants: dict[fx.Node, Value], bind: Callable[[Segment], fx.Node]) -> None:
    """Put each run of native calls in ``graph`` into a segment, in place. ``constants`` are nodes whose values never
    change; ``bind`` gives a node for a segment."""
    for node in list(graph.nodes):
        if node.target in DESCRIPTIONS:
            for user in [user for user in node.users if user.target is operator.getitem]:
                node.append(user)
    for run in _runs(graph):
        _replace(graph, run, constants, bind)
    graph.lint()


@dataclass(frozen=True)
class _Run:
    """Neighbours in a graph: native calls, views that they read, and views that only others read."""

    kept: list[fx.Node]
    left: list[fx.Node]

    @property
    def worth_it(self) -> bool:
        calls = [node.target for node in self.kept if node.target in DESCRIPTIONS]
        return len(calls) >= _WORTH_IT or len(self.kept) > len(calls) > 0 or not _LONG.isdisjoint(calls)


def _runs(graph: fx.Graph) -> list[_Run]:
    """Native calls with nothing between them but views."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "call_function" and (node.target in DESCRIPTIONS or _only_looks(node, runs[-1])):
            runs[-1].append(node)
        else:
            runs.append([])
    return [run for run in map(_divided, runs) if run.worth_it]


def _only_looks(node: fx.Node, before: Sequence[fx.Node]) -> bool:
    """Whether a node gives a view of one tensor, or picks one result of a call in the same run."""
    if node.target is operator.getitem:
        return node.args[0] in before
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1:
        return False
    schema = node.target._schema
    return is_view(node) and not schema.is_mutable and [str(result.type) for result in schema.returns] == ["Tensor"]


def _divided(run: list[fx.Node]) -> _Run:
    wanted: set[fx.Node] = set()
    for node in reversed(run):
        if node.target in DESCRIPTIONS or node.target is operator.getitem or node in wanted:
            wanted |= {node, *node.all_input_nodes}
    return _Run([node for node in run if node in wanted], [node for node in run if node not in wanted])


def _replace(graph: fx.Graph, run: _Run, constants: dict[fx.Node, Value], bind: Callable[[Segment], fx.Node]) -> None:
    inside = set(run.kept)
    read = dict.fromkeys(source for node in run.kept for source in node.all_input_nodes if source not in inside)
    inputs = [node for node in read if node not in constants]
    held = [node for node in read if node in constants]
    outputs = [node for node in run.kept if any(user not in inside for user in node.users)]
    part = fx.Graph()
    made = {node: part.placeholder(node.name) for node in (*inputs, *held)}
    for node in run.kept:
        made[node] = part.node_copy(node, made.__getitem__)
    part.output(tuple(made[node] for node in outputs))
    segment = bind(Segment(part, [constants[node] for node in held]))
    with graph.inserting_after(max(*run.kept, *run.left, run.kept[0])):
        last = whole = graph.call_function(run_segment, (segment, *inputs))
    for place, node in enumerate(outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (whole, place))
        node.replace_all_uses_with(last, lambda user: user not in inside)
    for node in run.left:  # they may look at what the segment makes
        last.append(node)
        last = node
    for node in reversed(run.kept):
        graph.erase_node(node)
