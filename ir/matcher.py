"""Matching patterns against a graph by backtracking, keeping the nearest partial match.

The matcher is pure: it changes neither the graph nor the pattern. Cost is linear in the number of nodes for patterns
of fixed size, because each attempt looks only at the cone that the pattern describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import arguments, is_tensor, schema_defaults
from regraft.ir.pattern import Call, Chain, Either, Hole, Pattern, Step, Variable

Bindings = Mapping[str, Any]


@dataclass(frozen=True)
class TakenStep:
    """One step of a chain as it was matched: its label, its outermost node, and its own bindings."""

    label: str
    node: fx.Node
    bindings: Bindings

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]


@dataclass(frozen=True)
class State:
    """What has been bound so far, and the interior nodes that the match consumes."""

    bindings: Bindings = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def bind(self, name: str | None, value: Any) -> State | None:
        """The state with ``name`` bound; None when it is bound to something else already."""
        if name is None:
            return self
        if name in self.bindings:
            bound = self.bindings[name]
            same = bound is value if isinstance(bound, fx.Node) else bound == value
            return self if same else None
        return State({**self.bindings, name: value}, self.nodes)

    def consume(self, node: fx.Node) -> State:
        """The state with one more interior node."""
        return self if node in self.nodes else State(self.bindings, (*self.nodes, node))


@dataclass
class Partial:
    """The furthest that a failed match got: what had been matched, where it stopped and why."""

    state: State
    node: fx.Node | None
    expected: str

    @property
    def reason(self) -> str:
        """The mismatch in words."""
        found = _describe(self.node) if self.node is not None else "nothing"
        return f"expected {self.expected}, found {found}"


@dataclass
class Matcher:
    """One attempt to match; ``nearest`` is the furthest partial match of a failed attempt."""

    nearest: Partial | None = None

    def match(self, pattern: Pattern, root: fx.Node) -> Iterator[State]:
        """All ways in which ``pattern`` matches at ``root``, best-liked alternative first."""
        yield from self._solve(pattern, root, State())

    def _solve(self, pattern: Any, value: Any, state: State) -> Iterator[State]:
        if isinstance(pattern, Call):
            yield from self._solve_call(pattern, value, state)
        elif isinstance(pattern, Variable):
            yield from self._solve_variable(pattern, value, state)
        elif isinstance(pattern, Either):
            yield from self._solve_either(pattern, value, state)
        elif isinstance(pattern, Chain):
            yield from self._solve_chain(pattern, value, state)
        elif isinstance(pattern, Hole):
            yield from self._hole_reached(value, state)
        elif isinstance(pattern, (list, tuple)):
            yield from self._solve_sequence(pattern, value, state)
        elif _same_literal(pattern, value):
            yield state
        else:
            self._fail(state, value, repr(pattern))

    def _solve_variable(self, pattern: Variable, value: Any, state: State) -> Iterator[State]:
        fits = _KINDS[pattern.kind](value)
        bound = state.bind(pattern.name, value) if fits else None
        if bound is not None:
            yield bound
        else:
            self._fail(state, value, f"{pattern.kind} {pattern.name}")

    def _solve_call(self, pattern: Call, value: Any, state: State) -> Iterator[State]:
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in pattern.targets:
            self._fail(state, value, " or ".join(str(target) for target in pattern.targets))
            return
        bound = state.consume(value).bind(pattern.name, value)
        if bound is None:
            self._fail(state, value, f"the same {pattern.name} as before")
            return
        given = arguments(value)
        names = list(given)[: len(pattern.arguments)]
        wanted = dict(zip(names, pattern.arguments, strict=False)) | dict(pattern.keywords)
        if not pattern.loose and not self._defaults_hold(value, given, wanted, bound):
            return
        for order in _orders(pattern, wanted, names):
            yield from self._solve_all(list(order.items()), given, bound)

    def _defaults_hold(self, node: fx.Node, given: dict[str, Any], wanted: dict[str, Any], state: State) -> bool:
        defaults = schema_defaults(node.target)
        for name, value in given.items():
            if name not in wanted and name not in _IGNORED_ARGUMENTS and not _same_literal(defaults.get(name), value):
                self._fail(state, node, f"{node.target} with the default {name}")
                return False
        return True

    def _solve_all(self, wanted: list[tuple[str, Any]], given: dict[str, Any], state: State) -> Iterator[State]:
        if not wanted:
            yield state
            return
        (name, pattern), rest = wanted[0], wanted[1:]
        for solved in self._solve(pattern, given.get(name), state):
            yield from self._solve_all(rest, given, solved)

    def _solve_sequence(self, patterns: Any, value: Any, state: State) -> Iterator[State]:
        if not isinstance(value, (list, tuple)) or len(value) != len(patterns):
            self._fail(state, value, f"a list of {len(patterns)}")
            return
        pairs = {str(i): item for i, item in enumerate(value)}
        yield from self._solve_all([(str(i), item) for i, item in enumerate(patterns)], pairs, state)

    def _solve_either(self, pattern: Either, value: Any, state: State) -> Iterator[State]:
        named = state.bind(pattern.name, value)
        for label, alternative in pattern.alternatives:
            tagged = named.bind(pattern.tag, label) if named is not None else None
            if tagged is not None:
                yield from self._solve(alternative, value, tagged)

    def _solve_chain(self, pattern: Chain, value: Any, state: State) -> Iterator[State]:
        yield from self._solve_steps(pattern, value, state, (), set())

    def _solve_steps(
        self, pattern: Chain, value: Any, state: State, taken: tuple[TakenStep, ...], dead: set[Any]
    ) -> Iterator[State]:
        """Peel one step off ``value``, or stop and match what the chain wraps. ``taken`` is outermost first; ``dead``
        are nodes that lead nowhere, which a graph reaches by many ways."""
        if isinstance(value, fx.Node) and value in dead:
            return
        alive = False
        for step in pattern.steps:
            for inner, nodes, bindings in self._peel(step, value, state):
                widened = State(state.bindings, (*state.nodes, *(n for n in nodes if n not in state.nodes)))
                further = (*taken, TakenStep(step.label, value, bindings))
                for solved in self._solve_steps(pattern, inner, widened, further, dead):
                    alive = True
                    yield solved
        done = state.bind(pattern.name, tuple(reversed(taken)))
        if done is not None:
            for solved in self._solve(pattern.inner, value, done):
                alive = True
                yield solved
        if not alive and isinstance(value, fx.Node):
            dead.add(value)

    def _peel(self, step: Step, value: Any, state: State) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...], Bindings]]:
        """Match one step on its own bindings; yields what it wraps, the nodes it takes and what it binds."""
        private = Matcher()
        for solved in private._solve(step.pattern, value, State()):
            inner = solved.bindings[_HOLE]
            if inner is not value:
                yield inner, solved.nodes, solved.bindings

    def _hole_reached(self, value: Any, state: State) -> Iterator[State]:
        if is_tensor(value):
            bound = state.bind(_HOLE, value)
            if bound is not None:
                yield bound

    def _fail(self, state: State, value: Any, expected: str) -> None:
        if self.nearest is None or len(state.nodes) > len(self.nearest.state.nodes):
            at = value if isinstance(value, fx.Node) else (state.nodes[-1] if state.nodes else None)
            self.nearest = Partial(state, at, expected)


_HOLE = "__wrapped__"
#: Arguments that never change a value on one device.
_IGNORED_ARGUMENTS = frozenset({"pin_memory", "layout", "device", "non_blocking", "memory_format"})


def _orders(pattern: Call, wanted: dict[str, Any], names: list[str]) -> Iterator[dict[str, Any]]:
    yield wanted
    if pattern.commutative and len(names) >= 2:
        first, second = names[0], names[1]
        yield {**wanted, first: wanted[second], second: wanted[first]}


def _same_literal(expected: Any, value: Any) -> bool:
    if isinstance(expected, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(expected) == len(value) and all(_same_literal(a, b) for a, b in zip(expected, value, strict=True))
    if isinstance(value, fx.Node) or isinstance(expected, fx.Node):
        return expected is value
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    return bool(expected == value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), (torch.SymInt, torch.SymFloat, int, float))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


#: What each kind of variable binds.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "tensor": is_tensor,
    "scalar": _is_scalar,
    "anything": lambda _: True,
}


def _describe(node: fx.Node) -> str:
    return f"{node.target} ({node.name})" if node.op == "call_function" else f"{node.op} {node.name}"
