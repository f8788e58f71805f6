"""What a rewrite rule is.

A rule is declarative: a ``pattern``, a ``check`` that yields requirements with their reasons, a ``replace`` that
builds the new nodes, ``examples`` that must fire and agree, and ``near_misses`` that must be refused with a stated
reason. Rules hold no state; everything about one match is in the ``Match``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.matcher import State, TakenStep
from regraft.ir.nodes import Builder, is_tensor, rank, shape, size_equal
from regraft.ir.pattern import Call, Either, Pattern, variable
from regraft.ir.program import Program


@dataclass(frozen=True)
class Requirement:
    """A condition of a rule: whether it holds and, if not, why the site is refused and at which node."""

    holds: bool
    reason: str
    node: fx.Node | None = None


def need(holds: bool, reason: str, at: Any = None) -> Requirement:
    """``reason`` says what is wrong when ``holds`` is false: "query heads are not a multiple of kv heads"."""
    return Requirement(bool(holds), reason, at if isinstance(at, fx.Node) else None)


@dataclass
class Match:
    """A rule's pattern bound to nodes: ``match.query`` or ``match["query"]`` is what that variable bound.

    ``facts`` carries what ``check`` found out to ``replace``, so that no analysis is done twice and rules stay
    stateless.
    """

    root: fx.Node
    state: State
    program: Program
    dims: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        bindings = self.__dict__["state"].bindings
        if name in bindings:
            return bindings[name]
        raise AttributeError(f"the pattern binds nothing named {name!r}")

    def __getitem__(self, name: str) -> Any:
        return self.state.bindings[name]

    def __contains__(self, name: str) -> bool:
        return name in self.state.bindings

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Interior nodes that the match consumes, root first."""
        return self.state.nodes

    def steps(self, name: str) -> tuple[TakenStep, ...]:
        """The steps of a chain, innermost first."""
        return tuple(self.state.bindings.get(name, ()))

    def get(self, name: str, default: Any = None) -> Any:
        """What ``name`` bound, or ``default``."""
        return self.state.bindings.get(name, default)

    def weight_name(self, node: Any) -> str | None:
        """The weight that a node stands for, None when it is computed."""
        return self.program.weight_name(node) if isinstance(node, fx.Node) else None

    def sole_user(self, name: str) -> bool:
        """Whether the named interior node is read only inside the match."""
        inside = set(self.nodes)
        return all(user in inside for user in self.state.bindings[name].users)

    def shape(self, name: str, dims: str) -> Requirement:
        """Requires the named node's shape to be ``"B H S D"``; a name used before must have the same size."""
        node = self.state.bindings[name]
        wanted = dims.split()
        if not is_tensor(node) or rank(node) != len(wanted):
            return need(False, f"{name} does not have the {len(wanted)} dimensions {dims}", at=node)
        for label, size in zip(wanted, shape(node), strict=True):
            expected = int(label) if label.isdigit() else self.dims.setdefault(label, size)
            if not size_equal(expected, size):
                return need(False, f"{name} has size {size} where {dims} wants {label} = {expected}", at=node)
        return need(True, "")


#: What ``replace`` returns: the node that takes the root's place, several old nodes mapped to new ones, or None to
#: leave the graph as it is after all.
Replacement = fx.Node | dict[fx.Node, fx.Node] | None


@dataclass(frozen=True)
class Example:
    """A function of tensors and the inputs to call it with; ``reason`` is the refusal that a near miss must get."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    reason: str = ""


class Rule:
    """Base of all rules. Subclass it in a file of its own and list it in a pass."""

    #: What the rewrite promises about numbers.
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATED
    #: The kind of site that the rule recognises ("attention", "rms_norm"), for the report's counts.
    recognizes: ClassVar[str | None] = None
    #: A failed match that got far enough to bind this name is a site, and its refusal is reported.
    landmark: ClassVar[str | None] = None
    #: Refusals are not reported: an identity of the canonical form holds or does not, and nobody asks why.
    quiet: ClassVar[bool] = False
    #: Whether drift is always measured against an fp64 run of the original nodes.
    against_fp64: ClassVar[bool] = False
    examples: ClassVar[tuple[Example, ...]] = ()
    near_misses: ClassVar[tuple[Example, ...]] = ()

    @property
    def name(self) -> str:
        """The class name in kebab case: ``FuseAttention`` is ``fuse-attention``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    def pattern(self, *args: Any, **variables: Any) -> Any:
        """The pattern, as an expression over the variables that its parameters name."""
        raise TypeError(f"rule {self.name} has no pattern")

    def check(self, match: Match) -> Iterator[Requirement]:
        """Requirements beyond the pattern, in order; the first that fails is the reason of the refusal."""
        yield from ()

    def replace(self, match: Match, build: Builder) -> Replacement:
        """Build the new nodes; what is returned takes the place of the old."""
        raise TypeError(f"rule {self.name} has no replacement")

    def rehearsal(self, match: Match, build: Builder) -> fx.Node | None:
        """What is checked in place of the replacement, where that cannot run by itself (it speaks to other
        processes): the same computation in this process, erased once it is checked. None: the replacement itself."""
        return None

    @cached_property
    def compiled(self) -> Pattern:
        """The pattern with its parameters bound to tensor variables; made once."""
        parameters = inspect.signature(self.pattern).parameters
        taken = [name for name in parameters if hasattr(Match, name)]
        if taken:
            raise TypeError(f"rule {self.name}: a pattern variable cannot be called {taken[0]!r}, a match has that")
        pattern: Pattern = self.pattern(**{name: variable(name) for name in parameters})
        return pattern

    @cached_property
    def root_targets(self) -> frozenset[Any]:
        """Operators at which the pattern can start; the driver tries the rule only there."""
        return frozenset(_roots(self.compiled))


def _roots(pattern: Any) -> Iterator[Any]:
    if isinstance(pattern, Call):
        yield from pattern.targets
    elif isinstance(pattern, Either):
        for _, alternative in pattern.alternatives:
            yield from _roots(alternative)
    elif hasattr(pattern, "steps"):
        for step in pattern.steps:
            yield from _roots(step.pattern)
        yield from _roots(pattern.inner)
