"""Finding row-wise regions: sets of calls that one kernel holds, legal, convex, and worth it by the cost model.

Calls grow together along the edges of the graph. Two sets may become one when no path leaves it and comes back
(otherwise the kernel would wait for itself), when their dims agree on what is a row (``axes.py``), and when that saves
bytes: what one wrote and the other read stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from regraft.codegen.rowwise.axes import RowAxes, Unfusable
from regraft.codegen.rowwise.expand import expand
from regraft.codegen.rowwise.operators import Kind, Step, is_free_view, step_of, works_on_rows
from regraft.ir.cost import footprint, node_cost
from regraft.ir.nodes import is_tensor, user_line
from regraft.ir.ops import OPERATORS
from regraft.ir.program import Program


@dataclass(frozen=True)
class Region:
    """Calls of one kernel, in topological order; ``outputs`` are read outside. Bytes are what the calls move through
    memory one by one, and what the kernel moves."""

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    bytes_before: float
    bytes_after: float

    @property
    def reason(self) -> str:
        """Why it is one kernel, by the cost model."""
        return f"{len(self.nodes)} calls move {_size(self.bytes_before)}, one kernel {_size(self.bytes_after)}"


@dataclass(frozen=True)
class Left:
    """A row-wise call that stays as it is, and why."""

    node: str
    reason: str
    user_line: str


@dataclass(frozen=True)
class Partition:
    """The regions of a graph in order, and the row-wise calls outside."""

    regions: tuple[Region, ...]
    left: tuple[Left, ...]


def find_regions(program: Program, refuse: Callable[[fx.Node], str | None] = lambda node: None) -> Partition:
    """The regions of a program's graph. ``refuse`` says why a call is none for a kernel on the device at hand."""
    finder = _Finder(program, refuse)
    finder.grow()
    regions, left = [], list(finder.left)
    for nodes in finder.sets():
        region = finder.region(nodes)
        if isinstance(region, Region):
            regions.append(region)
        else:
            left += [Left(node.name, region, user_line(node)) for node in nodes if not _moves(node)]
    order = finder.order
    left.sort(key=lambda item: item.node)
    return Partition(tuple(sorted(regions, key=lambda region: order[region.nodes[0]])), tuple(left))


class _Finder:
    def __init__(self, program: Program, refuse: Callable[[fx.Node], str | None]) -> None:
        self.program = program
        self._refuse = refuse
        self.order = {node: place for place, node in enumerate(program.graph.nodes)}
        self.left: list[Left] = []
        self.set_of: dict[fx.Node, int] = {}
        self.members: dict[int, set[fx.Node]] = {}
        self.steps: dict[fx.Node, Step] = {}
        self._find_candidates()
        self.paths = self._paths()
        self.last = {number: max(map(self.order.__getitem__, nodes)) for number, nodes in self.members.items()}

    def _find_candidates(self) -> None:
        """Every call is a set by itself; the parts of a call that has several results belong to it."""
        constant = _made_of_weights(self.program)
        for place, node in enumerate(self.program.graph.nodes):
            if node.op != "call_function":
                continue
            step = self._step(node)
            if not isinstance(step, str) and node not in constant:
                self.steps[node] = step
            elif isinstance(step, str) and node not in constant and works_on_rows(node):
                self.left.append(Left(node.name, step, user_line(node)))
            number = place
            if node in self.steps and self.steps[node].kind is Kind.PART:
                number = self.set_of[self.steps[node].tensors[0]]
            self.set_of[node] = number
            self.members.setdefault(number, set()).add(node)

    def _step(self, node: fx.Node) -> Step | str:
        step = step_of(node)
        return step if isinstance(step, str) else self._refuse(node) or step

    def _paths(self) -> nx.DiGraph:
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_nodes_from(self.members)
        for node, number in self.set_of.items():
            for operand in node.all_input_nodes:
                source = self.set_of.get(operand, number)
                if source != number:
                    graph.add_edge(source, number)
        return graph

    def grow(self) -> None:
        """Join each call with the sets that it reads, as far as that is legal and pays."""
        for node in self.steps:
            operands = [operand for operand in node.all_input_nodes if operand in self.steps]
            for operand in sorted(operands, key=lambda n: -footprint(n.meta["val"])):
                self._try(self.set_of[operand], self.set_of[node])

    def sets(self) -> list[list[fx.Node]]:
        """Sets of candidates, in topological order inside."""
        return [self._sorted(nodes) for nodes in self.members.values() if all(node in self.steps for node in nodes)]

    def _try(self, source: int, target: int) -> None:
        if source == target or not self._convex(source, target):
            return
        nodes = self.members[source] | self.members[target]
        parts = [self._traffic(self.members[number]) for number in (source, target)]
        if self._traffic(nodes) >= sum(parts) or self._misfit(self._sorted(nodes)) is not None:
            return
        self.members[source] = nodes
        for node in self.members.pop(target):
            self.set_of[node] = source
        self.last[source] = max(self.last[source], self.last.pop(target))
        self.paths.add_edges_from((source, after) for after in list(self.paths.successors(target)))
        self.paths.add_edges_from((before, source) for before in list(self.paths.predecessors(target)))
        self.paths.remove_node(target)
        if self.paths.has_edge(source, source):
            self.paths.remove_edge(source, source)

    def _convex(self, source: int, target: int) -> bool:
        """Whether no path leads from one set to the other but their own edges."""
        limit = self.last[target]
        pending = [number for number in self.paths.successors(source) if number != target]
        seen = set(pending)
        while pending:
            for after in self.paths.successors(pending.pop()):
                if after == target:
                    return False
                if after not in seen and min(map(self.order.__getitem__, self.members[after])) <= limit:
                    seen.add(after)
                    pending.append(after)
        return True

    def _misfit(self, nodes: Sequence[fx.Node]) -> str | None:
        """Why calls are no one kernel; None where they are."""
        try:
            axes = RowAxes.of(nodes)
        except Unfusable as reason:
            return str(reason)
        rows = set(axes.sizes)
        outputs = set(outputs_of(nodes))
        if not any(axes.axes(node) == rows for node in outputs):
            return "no result has all the rows"
        for node in nodes:
            if axes.axes(node) != rows and (
                node in outputs or self.steps[node].costly or len(self._inputs([node])) > 1
            ):
                return f"{node.name} would be computed again for many rows"
        return None

    def region(self, nodes: Sequence[fx.Node]) -> Region | str:
        """The region of a set, without the views at its ends; or why it is none."""
        nodes = self._trimmed(nodes)
        if not nodes or all(is_free_view(node) for node in nodes):
            return "nothing is computed"
        reason = self._misfit(nodes)
        if reason is not None:
            return reason
        before = sum(self._bytes(node) for node in nodes)
        after = self._traffic(set(nodes))
        if after >= before:
            return "a kernel of its own would move as many bytes"
        return Region(tuple(nodes), tuple(outputs_of(nodes)), before, after)

    def _trimmed(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Views at the ends of a region cost nothing outside: kernels take any strides."""
        kept = list(nodes)
        while True:
            inside = set(kept)
            odd = [node for node in kept if is_free_view(node) and self._at_an_end(node, inside)]
            if not odd:
                return kept
            kept = [node for node in kept if node not in odd]

    def _at_an_end(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        if not any(user in inside for user in node.users):
            return True
        leads = not any(operand in inside for operand in node.all_input_nodes)
        cuts = self.steps[node].kind is Kind.COLUMNS
        return leads and (not cuts or any(user not in inside for user in node.users))

    def _bytes(self, node: fx.Node) -> float:
        """Bytes of a call as it runs without a kernel: operators of ours run their definition."""
        if node.target not in OPERATORS:
            return node_cost(node).bytes
        parts = [] if is_tensor(node) else [user for user in node.users if user in self.steps]
        made = expand([node, *parts], parts or [node], self.program.fake_mode)
        return sum(node_cost(call).bytes for call in made.graph.nodes if call.op == "call_function")

    def _traffic(self, nodes: set[fx.Node]) -> float:
        """Bytes that one kernel of these calls reads and writes."""
        read = sum(footprint(node.meta["val"]) for node in self._inputs(nodes))
        return read + sum(footprint(node.meta["val"]) for node in outputs_of(self._sorted(nodes)))

    def _inputs(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        inside = set(nodes)
        return {operand for node in inside for operand in self.steps[node].tensors if operand not in inside}

    def _sorted(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=self.order.__getitem__)


def outputs_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values of calls that are read outside, or by nobody."""
    inside = set(nodes)
    return [
        node for node in nodes if is_tensor(node) and (not node.users or any(user not in inside for user in node.users))
    ]


def _made_of_weights(program: Program) -> set[fx.Node]:
    """Weights, and calls that read nothing else: these are computed once."""
    found = set(program.weight_placeholders())
    for node in program.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _moves(node: fx.Node) -> bool:
    return is_free_view(node) or not is_tensor(node)


def _size(count: float) -> str:
    """Bytes as one reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
