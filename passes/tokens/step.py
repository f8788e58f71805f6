"""What the tokens do at one node: its class, what becomes of the axis, and what a reduction obliges to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from regraft.passes.tokens.layout import Layout


class Kind(Enum):
    """The classes of the type system on the token axis.

    ``EQUIVARIANT``: what it does to a token depends on that token (permuting tokens permutes the result).
    ``REDUCIBLE``: it adds up over tokens, and adds up the same when each merged token counts by its size.
    ``SELECTIVE``: it takes tokens by their place at an end of the sequence, which must be protected.
    ``BARRIER``: it needs all tokens in their places; they are put back in front of it.
    """

    EQUIVARIANT = "equivariant"
    REDUCIBLE = "weighted-reducible"
    SELECTIVE = "selective"
    BARRIER = "barrier"


class Duty(Enum):
    """How a node is written for fewer tokens."""

    SAME = "as it is"
    RESIZE = "sizes of the tokens that are left"
    ATTENTION = "log of the sizes on the keys, masks and biases gathered"
    MEAN = "mean weighted by the sizes"
    SUM = "sum weighted by the sizes"
    SELECT = "the same place at a protected end"
    SLICE = "the same places between protected ends"
    ENDS = "protected ends put back around the tokens that are left"
    UNMERGE = "every token put back before it"


@dataclass(frozen=True)
class Step:
    """One node. ``layout`` is that of its result, None where it holds no tokens. ``prefix`` and ``suffix`` are how many
    tokens at the ends must stay as they are. ``reason`` says why a barrier is one. ``heavy``: work that shrinks with
    the tokens."""

    kind: Kind
    duty: Duty
    layout: Layout | None = None
    prefix: int = 0
    suffix: int = 0
    reason: str = ""
    heavy: bool = False


def equivariant(layout: Layout, duty: Duty = Duty.SAME, heavy: bool = False) -> Step:
    """A node that does the same to each token."""
    return Step(Kind.EQUIVARIANT, duty, layout, heavy=heavy)


def barrier(reason: str) -> Step:
    """A node that needs all tokens in their places."""
    return Step(Kind.BARRIER, Duty.UNMERGE, reason=reason)
