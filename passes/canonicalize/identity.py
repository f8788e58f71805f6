"""Identities: small bitwise rules written as one function on a node.

``identity`` turns a function ``(node, build) -> replacement or None`` into a rule that is tried at the operators it
names; None leaves the node as it is. A folder of such functions reads as a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.pattern import Call
from regraft.ir.rule import Match, Replacement, Rule

Rewrite = Callable[[fx.Node, Builder], fx.Node | None]


class Identity(Rule):
    """A rule made of one function; its name is the function's."""

    exactness = Exactness.BITWISE
    quiet = True

    def __init__(self, targets: tuple[Any, ...], rewrite: Rewrite, exactness: Exactness) -> None:
        self._targets = targets
        self._rewrite = rewrite
        self._exactness = exactness
        self.exactness = exactness  # type: ignore[misc]

    @property
    def name(self) -> str:
        """The function's name in kebab case."""
        return self._rewrite.__name__.replace("_", "-")

    def pattern(self, **variables: Any) -> Any:
        """Any call of the operators that the identity names."""
        return Call(self._targets, loose=True)

    def replace(self, match: Match, build: Builder) -> Replacement:
        """What the function returns."""
        return self._rewrite(match.root, build)


def identity(*targets: Any, exactness: Exactness = Exactness.BITWISE) -> Callable[[Rewrite], Identity]:
    """Make a rule of the decorated function, tried at ``targets``."""

    def wrap(rewrite: Rewrite) -> Identity:
        return Identity(targets, rewrite, exactness)

    return wrap
