"""How a lossy pass offers what it can do: one candidate for each site and each value of its knob.

An offer is a function of a recognised program that returns candidates; those in ``passes/budget/offers.py`` are asked.
The budget measures each candidate's time and loss, picks, and measures the composition: a pass need not know how much
it loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from regraft.ir.program import Program
from regraft.passes.base import Pass

#: Values of ``order``: attention is changed while its sites are as they were recognised, then tokens go, then types.
ATTENTION, TOKENS, PRECISION = 0, 1, 2


@dataclass(frozen=True)
class Candidate:
    """One lossy rewrite of one site, with its knob at one value.

    ``site`` says what is changed and ``knob`` how, as a reader of the report wants to see it; at most one candidate of
    a site is applied, and none together with one of a site in ``excludes``. ``rewrite`` runs on the recognised program,
    before linear layers are merged. It finds its site by what other candidates leave alone: the place of an attention
    among the attentions, the name of a weight. It is deterministic, and where it can do nothing it changes nothing.
    ``family`` groups candidates that are worth offering together, or not at all. ``order``: lower ones run first.
    """

    site: str
    knob: str
    rewrite: Pass
    family: str
    order: int = ATTENTION
    user_line: str = ""
    excludes: frozenset[str] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        """Site and knob."""
        return f"{self.site}: {self.knob}"


@dataclass(frozen=True)
class NotOffered:
    """Why a family has no candidate in a program."""

    family: str
    reason: str

    def __str__(self) -> str:
        return f"{self.family}: not offered, because {self.reason}"


class Offer(Protocol):
    """What a lossy pass can do to a recognised program."""

    def __call__(self, program: Program, target: str) -> Iterable[Candidate | NotOffered]:
        """Candidates for ``program``, which stays as it is; of one site, milder ones come first. Where there are none,
        the reason."""
        ...


Composition = tuple[Candidate, ...]


def composed(candidates: Iterable[Candidate]) -> Composition:
    """Candidates of distinct sites in the order in which their rewrites run."""
    return tuple(sorted(candidates, key=lambda candidate: (candidate.order, candidate.site)))


def rewrites(composition: Sequence[Candidate]) -> tuple[Pass, ...]:
    """The passes of a composition, in order."""
    return tuple(candidate.rewrite for candidate in composition)


def name_of(composition: Sequence[Candidate]) -> tuple[str, ...]:
    """The names of its candidates, by which a composition is known."""
    return tuple(candidate.name for candidate in composition)
