"""Measured time of every node of a graph: run node by node, with warm-up, median of several runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from regraft.ir.program import Program
from regraft.report.model import OperatorRow


@dataclass(frozen=True)
class Group:
    """Nodes of one operator at one line of the user's code, together."""

    operator: str
    user_line: str
    calls: int
    seconds: float


class _Timer(fx.Interpreter):
    """Interprets a graph and writes down how long each call took."""

    def __init__(self, module: fx.GraphModule, wait: Callable[[], None]) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}
        self._wait = wait

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module"):
            return super().run_node(n)
        self._wait()
        started = time.perf_counter()
        result = super().run_node(n)
        self._wait()
        self.seconds[n.name] = time.perf_counter() - started
        return result


def measure(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    runs: int = 5,
    warm_up: int = 2,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Node name -> median seconds over ``runs``, after ``warm_up`` runs that do not count.

    ``inputs`` are the values of the placeholders in order; ``advance`` is called after each run. A node's
    time includes the interpreter's share, a few microseconds, alike before and after.
    """
    if runs < 1:
        raise ValueError(f"a median needs at least one run, not {runs}")
    wait = torch.cuda.synchronize if _on_cuda(inputs) else _nothing
    samples: dict[str, list[float]] = {}
    for number in range(warm_up + runs):
        timer = _Timer(module, wait)
        with torch.no_grad():
            timer.run(*inputs, enable_io_processing=False)
        if number >= warm_up:
            for name, seconds in timer.seconds.items():
                samples.setdefault(name, []).append(seconds)
        advance()
    return {name: median(values) for name, values in samples.items()}


class _Observer(fx.Interpreter):
    """Interprets a graph and keeps the shape, strides and element type of every value, not the value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = tree_map_only(torch.Tensor, _shell, result)
        return result


def observed(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.Graph:
    """A copy of the graph whose nodes carry values as seen in one run: a lowered graph has none of its own."""
    observer = _Observer(module)
    with torch.no_grad():
        observer.run(*inputs, enable_io_processing=False)
    copy = fx.Graph()
    output = copy.graph_copy(module.graph, {})
    copy.output(output)
    for old, new in zip(module.graph.nodes, copy.nodes, strict=True):
        new.meta = {**old.meta, "val": observer.values[old.name]}
        new.name = old.name
    return copy


def _shell(value: torch.Tensor) -> torch.Tensor:
    if value.layout is not torch.strided:  # a packed weight has a shape and no strides
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def placeholder_values(program: Program, flat_inputs: Sequence[Any]) -> list[Any]:
    """The values of all placeholders of a program, in graph order: weights and user inputs."""
    held = {node.name: program.weights.get(program.weight_name(node) or "") for node in program.weight_placeholders()}
    held |= dict(zip((node.name for node in program.user_inputs()), flat_inputs, strict=True))
    return [held.get(node.name) for node in program.graph.nodes if node.op == "placeholder"]


def with_measured(rows: Iterable[OperatorRow], seconds: Mapping[str, float]) -> list[OperatorRow]:
    """The rows with their measured times; a row whose node was not run keeps None."""
    return [dataclasses.replace(row, measured_seconds=seconds.get(row.node)) for row in rows]


def grouped(rows: Iterable[OperatorRow]) -> list[Group]:
    """Rows by operator and line, longest first: measured time where there is one, else predicted."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        spent = row.predicted_seconds if row.measured_seconds is None else row.measured_seconds
        groups.setdefault((row.operator, row.user_line), []).append(spent)
    made = [Group(name, line, len(times), sum(times)) for (name, line), times in groups.items()]
    return sorted(made, key=lambda group: -group.seconds)


def _on_cuda(inputs: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)


def _nothing() -> None:
    """On a CPU a call has ended when it returns."""
