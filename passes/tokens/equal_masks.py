"""Which rows, and which columns, of an attention's mask and bias are the same: proved, not compared.

A mask is evaluated as far as one place decides it: behind ``prefix(5)`` no key is hidden by ``keys(0) | ~prefix(5)``,
whatever the tensor says. What is left of it at each place is compared as a formula.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import fx

from regraft.ir.mask import (
    KEY_LENGTH,
    QUERY_LENGTH,
    And,
    Dense,
    Everything,
    Heads,
    Keys,
    Not,
    Nothing,
    Or,
    Predicate,
    Prefix,
    Rows,
    Same,
    parse,
)
from regraft.ir.nodes import arguments, rank, shape, size_equal
from regraft.passes.tokens.equal_places import EqualPlaces

ROWS, COLUMNS = -2, -1


def mask_keys(equal: EqualPlaces, attention: fx.Node, dim: int) -> list[Hashable]:
    """For each row (``dim`` -2) or column (-1) of the mask, a key: where these are equal, the mask is the same."""
    given = arguments(attention)
    lengths = shape(given["query"])[2], shape(given["key"])[2]
    reader = _Reader(equal, given["mask_tensors"], dim, lengths)
    mask = parse(given["mask"])
    return [reader.key(mask, place) for place in range(lengths[dim])]


def bias_keys(equal: EqualPlaces, bias: fx.Node, dim: int, size: int) -> Sequence[Hashable]:
    """The same for a bias, which is broadcast to ``size`` rows or columns."""
    return (0,) * size if rank(bias) < -dim or size_equal(shape(bias)[dim], 1) else equal.keys(bias, dim)


@dataclass(frozen=True)
class _Reader:
    """``sources`` are the tensors that the mask reads; ``lengths`` of queries and keys."""

    equal: EqualPlaces
    sources: Sequence[fx.Node]
    dim: int
    lengths: tuple[int, int]

    def key(self, mask: Predicate, place: int) -> Hashable:
        """True, False, or what is left to decide at a place."""
        match mask:
            case Everything():
                return True
            case Nothing():
                return False
            case Not(operand):
                inner = self.key(operand, place)
                return not inner if isinstance(inner, bool) else ("not", inner)
            case And(operands):
                return self._joined("and", operands, place, neutral=True)
            case Or(operands):
                return self._joined("or", operands, place, neutral=False)
            case Keys(number):
                return str(mask), self._entry(number, COLUMNS, place)
            case Rows(number):
                return str(mask), self._entry(number, ROWS, place)
            case Same(left, right):
                return str(mask), self._entry(left, ROWS, place), self._entry(right, COLUMNS, place)
            case Dense(number):
                return str(mask), bias_keys(self.equal, self.sources[number], self.dim, self.lengths[self.dim])[place]
            case Prefix(length) if self.dim == COLUMNS and all(isinstance(size, int) for size in self.lengths):
                return place < length.evaluate({QUERY_LENGTH: self.lengths[ROWS], KEY_LENGTH: self.lengths[COLUMNS]})
            case Prefix() if self.dim == ROWS:
                return str(mask)  # the same in every row
            case Heads():
                return str(mask)
        return str(mask), place  # it looks at the place itself

    def _joined(self, name: str, operands: Sequence[Predicate], place: int, neutral: bool) -> Hashable:
        keys = [self.key(operand, place) for operand in operands]
        if any(key is not neutral and isinstance(key, bool) for key in keys):
            return not neutral
        left = [key for key in keys if key is not neutral]
        return (name, *left) if left else neutral

    def _entry(self, number: int, side: int, place: int) -> Hashable:
        """What a vector over rows or columns says of a place; nothing where it goes along the other side."""
        if side != self.dim:
            return None
        source = self.sources[number]
        along = rank(source) > 0 and size_equal(shape(source)[-1], self.lengths[side])
        return self.equal.keys(source, -1)[place] if along else place
