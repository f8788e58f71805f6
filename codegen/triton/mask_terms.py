"""A mask as kernels take it: a union of at most three key intervals per row, and a test of the pairs inside.

An interval is found by closed form from the row, so that tiles of keys which no row of a tile of queries sees are
never visited, and tiles which all rows see whole need no predicate (attention.md 3.3). What has no interval form stays
a test of each pair (query, key).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from regraft.ir.mask import And, Band, Chunk, Everything, Heads, Lengths, Not, Nothing, Or, Predicate, Prefix, Rows

#: Unions of more intervals are tested pair by pair.
MOST_TERMS = 3


@dataclass(frozen=True)
class Term:
    """A conjunction: ``bounds`` narrow the interval of keys, ``tests`` are left to each pair."""

    bounds: tuple[Predicate, ...]
    tests: tuple[Predicate, ...] = ()

    @property
    def text(self) -> str:
        """The bounds as a predicate."""
        return str(And(self.bounds)) if len(self.bounds) > 1 else str(self.bounds[0] if self.bounds else Everything())


@dataclass(frozen=True)
class MaskTerms:
    """The union of ``terms``, and ``tests`` that hold beside each of them."""

    terms: tuple[Term, ...]
    tests: tuple[Predicate, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the intervals say all, so that a tile inside one needs no predicate."""
        return not self.tests and not any(term.tests for term in self.terms)


def mask_terms(predicate: Predicate) -> MaskTerms:
    """The terms of a predicate in normal form (``ir.mask.simplify``)."""
    conjunctions = _disjuncts(predicate)
    if len(conjunctions) > MOST_TERMS:
        return MaskTerms((Term(()),), (predicate,))
    common = [part for part in conjunctions[0] if not _narrows(part) and all(part in other for other in conjunctions)]
    terms = tuple(
        Term(
            tuple(part for part in parts if _narrows(part)),
            tuple(part for part in parts if not _narrows(part) and part not in common),
        )
        for parts in conjunctions
    )
    return MaskTerms(terms, tuple(common))


def everywhere(predicate: Predicate) -> MaskTerms:
    """The predicate as a test of all pairs: what a number that takes weight at masked scores asks for."""
    return MaskTerms((Term(()),), () if isinstance(predicate, Everything) else (predicate,))


def _narrows(part: Predicate) -> bool:
    """Whether a conjunct is an interval of keys for each row; a condition on row or head leaves all keys or none."""
    match part:
        case Band() | Prefix() | Lengths() | Chunk() | Rows() | Heads() | Nothing():
            return True
        case Not(Prefix() | Lengths() | Rows() | Heads()):
            return True
    return False


def _disjuncts(predicate: Predicate) -> list[list[Predicate]]:
    """The disjunctive form: conjunctions of atoms and negated atoms, without what always holds."""
    match predicate:
        case Or(operands):
            return [parts for operand in operands for parts in _disjuncts(operand)]
        case And(operands):
            choices = product(*(_disjuncts(operand) for operand in operands))
            return [list(dict.fromkeys(part for parts in choice for part in parts)) for choice in choices]
        case Everything():
            return [[]]
    return [[predicate]]
