"""``simplify``: a normal form of predicates with the same meaning.

Identities: De Morgan, flattening, absorption, complements, also those within an operand; bands meet in And and
absorb in Or where their bounds compare; prefixes likewise; bounds which the lengths make idle are dropped. Operands
are ordered by their text.
"""

from __future__ import annotations

from regraft.ir.mask.length import KEY_LENGTH, QUERY_LENGTH, Length, symbol
from regraft.ir.mask.predicate import (
    EVERYTHING,
    NOTHING,
    And,
    Band,
    Chunk,
    Everything,
    Not,
    Nothing,
    Or,
    Predicate,
    Prefix,
    Same,
)


def simplify(
    predicate: Predicate, query_length: Length | int | None = None, key_length: Length | int | None = None
) -> Predicate:
    """The normal form, for the given lengths (default: the symbols ``query_len`` and ``key_len``)."""
    rows = symbol(QUERY_LENGTH) if query_length is None else Length.of(query_length)
    columns = symbol(KEY_LENGTH) if key_length is None else Length.of(key_length)
    return _Simplifier(rows, columns).visit(predicate)


class _Simplifier:
    def __init__(self, rows: Length, columns: Length) -> None:
        self._rows, self._columns = rows, columns

    def visit(self, predicate: Predicate) -> Predicate:
        match predicate:
            case Not(operand):
                return self._negate(operand)
            case And(operands):
                return self._meet([self.visit(operand) for operand in operands])
            case Or(operands):
                return self._join([self.visit(operand) for operand in operands])
            case Band() | Prefix():
                return self._atom(predicate)
            case Chunk(size=1, offset=offset):
                return self._atom(Band(offset, offset))
        return predicate

    def _negate(self, predicate: Predicate) -> Predicate:
        match predicate:
            case Everything():
                return NOTHING
            case Nothing():
                return EVERYTHING
            case Not(operand):
                return self.visit(operand)
            case And(operands):
                return self._join([self._negate(operand) for operand in operands])
            case Or(operands):
                return self._meet([self._negate(operand) for operand in operands])
        atom = self.visit(predicate)
        match atom:
            case Everything():
                return NOTHING
            case Nothing():
                return EVERYTHING
            case Band(lower, upper):
                below = [] if lower is None else [self._atom(Band(None, lower - 1))]
                above = [] if upper is None else [self._atom(Band(upper + 1, None))]
                return self._join([*below, *above])
        return Not(atom)

    def _atom(self, atom: Predicate) -> Predicate:
        if isinstance(atom, Prefix):
            if atom.length.at_least(self._columns):
                return EVERYTHING
            return NOTHING if Length().at_least(atom.length) else atom
        assert isinstance(atom, Band)
        lower, upper = atom.lower, atom.upper
        if lower is not None and (-self._rows + 1).at_least(lower):
            lower = None
        if upper is not None and upper.at_least(self._columns - 1):
            upper = None
        if lower is None and upper is None:
            return EVERYTHING
        impossible = (
            (lower is not None and upper is not None and lower.at_least(upper + 1))
            or (lower is not None and lower.at_least(self._columns))
            or (upper is not None and (-self._rows).at_least(upper))
        )
        return NOTHING if impossible else Band(lower, upper)

    def _meet(self, operands: list[Predicate]) -> Predicate:
        flat: list[Predicate] = []
        for operand in operands:
            parts = operand.operands if isinstance(operand, And) else (operand,)
            for part in parts:
                flat = self._insert_meet(flat, part)
        return self._finish(flat, And, EVERYTHING, NOTHING)

    def _insert_meet(self, flat: list[Predicate], part: Predicate) -> list[Predicate]:
        for place, other in enumerate(flat):
            merged = self._meet_pair(other, part)
            if merged is not None:
                rest = flat[:place] + flat[place + 1 :]
                return self._insert_meet(rest, merged)
        return [*flat, part]

    def _meet_pair(self, left: Predicate, right: Predicate) -> Predicate | None:
        if isinstance(left, Band) and isinstance(right, Band):
            found = _larger(left.lower, right.lower), _smaller(left.upper, right.upper)
            if found[0] is not False and found[1] is not False:
                return self._atom(Band(found[0], found[1]))  # type: ignore[arg-type]
        if isinstance(left, Prefix) and isinstance(right, Prefix):
            shorter = _smaller(left.length, right.length)
            return Prefix(shorter) if isinstance(shorter, Length) else None
        return None

    def _join(self, operands: list[Predicate]) -> Predicate:
        flat: list[Predicate] = []
        for operand in operands:
            for part in operand.operands if isinstance(operand, Or) else (operand,):
                covered = any(_covers(other, part) for other in flat)
                flat = flat if covered else [*(other for other in flat if not _covers(part, other)), part]
        bands = [part for part in flat if isinstance(part, Band)]
        no_gap = False
        for left in bands:
            for right in bands:
                # band(None,a) | band(b,None) with b <= a + 1 leaves no gap.
                open_ends = left.lower is None and right.upper is None
                if open_ends and left.upper is not None and right.lower is not None:
                    no_gap = no_gap or (left.upper + 1).at_least(right.lower)
        if no_gap:
            return EVERYTHING
        return self._finish(flat, Or, NOTHING, EVERYTHING)

    def _finish(
        self, flat: list[Predicate], kind: type[And] | type[Or], neutral: Predicate, absorbing: Predicate
    ) -> Predicate:
        parts = set(flat) - {neutral}
        dual = Or if kind is And else And
        if absorbing in parts:
            return absorbing
        if any(_complement(part) in parts for part in parts):
            return absorbing
        reduced = {_without_complements(part, parts, dual) for part in parts}
        if reduced != parts:
            return self._join(list(reduced)) if kind is Or else self._meet(list(reduced))
        kept = {part for part in parts if not (isinstance(part, dual) and parts.intersection(part.operands))}
        ordered = sorted(kept, key=_order)
        if not ordered:
            return neutral
        return ordered[0] if len(ordered) == 1 else kind(tuple(ordered))


def _without_complements(part: Predicate, parts: set[Predicate], dual: type[And] | type[Or]) -> Predicate:
    """``a | (b & ~a)`` is ``a | b``: what ``part`` joins without the complements of the parts beside it."""
    if not isinstance(part, dual):
        return part
    rest = tuple(operand for operand in part.operands if _complement(operand) not in parts)
    if not rest:
        return EVERYTHING if dual is And else NOTHING
    return rest[0] if len(rest) == 1 else dual(rest)


def _complement(atom: Predicate) -> Predicate | None:
    """The normal form of the negated atom; None where that is no single atom."""
    match atom:
        case Not(operand):
            return operand
        case Band(None, Length() as upper):
            return Band(upper + 1, None)
        case Band(Length() as lower, None):
            return Band(None, lower - 1)
        case Band() | And() | Or():
            return None
    return Not(atom)


def _order(predicate: Predicate) -> tuple[int, str]:
    return (
        isinstance(predicate, (And, Or, Not)) + (not isinstance(predicate, (Band, Prefix, Same))),
        str(predicate),
    )


def _larger(left: Length | None, right: Length | None) -> Length | bool | None:
    """The larger lower bound; None is no bound, False "cannot be compared"."""
    if left is None or right is None:
        return left if right is None else right
    if left.at_least(right):
        return left
    return right if right.at_least(left) else False


def _smaller(left: Length | None, right: Length | None) -> Length | bool | None:
    if left is None or right is None:
        return left if right is None else right
    if left.at_least(right):
        return right
    return left if right.at_least(left) else False


def _covers(wide: Predicate, narrow: Predicate) -> bool:
    """Proof that every pair visible in ``narrow`` is visible in ``wide``."""
    if wide == narrow:
        return True
    if isinstance(wide, Band) and isinstance(narrow, Band):
        below = wide.lower is None or (narrow.lower is not None and narrow.lower.at_least(wide.lower))
        above = wide.upper is None or (narrow.upper is not None and wide.upper.at_least(narrow.upper))
        return below and above
    if isinstance(wide, Prefix) and isinstance(narrow, Prefix):
        return wide.length.at_least(narrow.length)
    return False
