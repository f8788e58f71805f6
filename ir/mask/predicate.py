"""Predicates: which keys each query sees, as boolean combinations of a few atoms.

A predicate describes m[batch, head, query, key], true = visible. ``query`` and ``key`` are indices from 0.
Tensor operands are numbers: positions in the tuple of tensors which goes with the predicate. The text form
(``str``) is compact and ``predicate_text.parse`` is its inverse: ``band(None,0) & keys(0) & same(1,1)``.

Interval predicates after FlexAttention's mask_mod and FlashMask (arXiv:2410.01359): nearly every mask of
practice is a conjunction of key intervals and tensor tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from regraft.ir.mask.length import ZERO_LENGTH, Length


class Predicate:
    """The base of all predicates; ``&``, ``|`` and ``~`` build combinations without simplifying."""

    __slots__ = ()

    def __and__(self, other: Predicate) -> Predicate:
        return And((self, other))

    def __or__(self, other: Predicate) -> Predicate:
        return Or((self, other))

    def __invert__(self) -> Predicate:
        return Not(self)


@dataclass(frozen=True, slots=True)
class Everything(Predicate):
    """Every key is visible."""

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True, slots=True)
class Nothing(Predicate):
    """No key is visible."""

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class Band(Predicate):
    """``lower <= key - query <= upper``; None is no bound. Causal is ``band(None,0)``. Build with
    ``band``."""

    lower: Length | None
    upper: Length | None

    def __str__(self) -> str:
        return f"band({self.lower},{self.upper})"


@dataclass(frozen=True, slots=True)
class Prefix(Predicate):
    """``key < length``. Build with ``prefix``."""

    length: Length

    def __str__(self) -> str:
        return f"prefix({self.length})"


@dataclass(frozen=True, slots=True)
class Lengths(Predicate):
    """``key < t[batch]``: the tensor has one number a batch, or one for all (any shape with that many
    entries)."""

    tensor: int

    def __str__(self) -> str:
        return f"lengths({self.tensor})"


@dataclass(frozen=True, slots=True)
class Keys(Predicate):
    """``t[batch, key] != 0``, a padding mask: the tensor reshapes to [batch or 1, key length]."""

    tensor: int

    def __str__(self) -> str:
        return f"keys({self.tensor})"


@dataclass(frozen=True, slots=True)
class Rows(Predicate):
    """``t[batch, query] != 0``: the tensor reshapes to [batch or 1, query length]."""

    tensor: int

    def __str__(self) -> str:
        return f"rows({self.tensor})"


@dataclass(frozen=True, slots=True)
class Same(Predicate):
    """``tq[batch, query] == tk[batch, key]``: packed documents; integer tensors shaped as in Rows and
    Keys."""

    query_tensor: int
    key_tensor: int

    def __str__(self) -> str:
        return f"same({self.query_tensor},{self.key_tensor})"


@dataclass(frozen=True, slots=True)
class Chunk(Predicate):
    """``(query + offset) // size == key // size``. Build with ``chunk``."""

    size: int
    offset: Length = ZERO_LENGTH

    def __str__(self) -> str:
        return f"chunk({self.size})" if self.offset == Length() else f"chunk({self.size},{self.offset})"


@dataclass(frozen=True, slots=True)
class Dense(Predicate):
    """``t != 0`` for a tensor which broadcasts to [batch, heads, query length, key length]."""

    tensor: int

    def __str__(self) -> str:
        return f"dense({self.tensor})"


@dataclass(frozen=True, slots=True)
class Heads(Predicate):
    """``first <= head < last``: masks that differ from head to head are unions of such parts. Build with ``heads``."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"heads({self.first},{self.last})"


@dataclass(frozen=True, slots=True)
class Bits(Predicate):
    """Bit ``n`` of the query's words is set, for key ``key_len - query_len + n``: which nodes of a tree are ancestors.
    The tensor is int64 ``[batch or 1, query length, words]`` of 64 bits each, the lowest first."""

    tensor: int

    def __str__(self) -> str:
        return f"bits({self.tensor})"


@dataclass(frozen=True, slots=True)
class Not(Predicate):
    operand: Predicate

    def __str__(self) -> str:
        return f"~{_nested(self.operand)}"


@dataclass(frozen=True, slots=True)
class And(Predicate):
    """All of at least two operands."""

    operands: tuple[Predicate, ...]

    def __str__(self) -> str:
        return " & ".join(_nested(operand) for operand in self.operands)


@dataclass(frozen=True, slots=True)
class Or(Predicate):
    """Any of at least two operands."""

    operands: tuple[Predicate, ...]

    def __str__(self) -> str:
        return " | ".join(_nested(operand) for operand in self.operands)


def _nested(predicate: Predicate) -> str:
    return f"({predicate})" if isinstance(predicate, (And, Or)) else str(predicate)


def band(lower: Length | int | str | None, upper: Length | int | str | None) -> Band:
    return Band(None if lower is None else Length.of(lower), None if upper is None else Length.of(upper))


def prefix(length: Length | int | str) -> Prefix:
    return Prefix(Length.of(length))


def chunk(size: int, offset: Length | int | str = 0) -> Chunk:
    if size < 1:
        raise ValueError(f"a chunk has at least one position, not {size}")
    return Chunk(size, Length.of(offset))


def heads(first: int, last: int) -> Heads:
    if not 0 <= first < last:
        raise ValueError(f"heads from {first} to {last} are none")
    return Heads(first, last)


CAUSAL = band(None, 0)
EVERYTHING = Everything()
NOTHING = Nothing()


def tensors_of(predicate: Predicate) -> frozenset[int]:
    """The positions of the tensors which the predicate reads."""
    match predicate:
        case Lengths(number) | Keys(number) | Rows(number) | Dense(number) | Bits(number):
            return frozenset((number,))
        case Same(left, right):
            return frozenset((left, right))
        case Not(operand):
            return tensors_of(operand)
        case And(operands) | Or(operands):
            return frozenset().union(*map(tensors_of, operands))
    return frozenset()


def names_heads(predicate: Predicate) -> bool:
    """Whether the predicate tells heads apart by their numbers."""
    match predicate:
        case Heads():
            return True
        case Not(operand):
            return names_heads(operand)
        case And(operands) | Or(operands):
            return any(map(names_heads, operands))
    return False


def map_atoms(predicate: Predicate, change: Callable[[Predicate], Predicate]) -> Predicate:
    """The same combination of what ``change`` makes of each atom."""
    match predicate:
        case Not(operand):
            return Not(map_atoms(operand, change))
        case And(operands):
            return And(tuple(map_atoms(operand, change) for operand in operands))
        case Or(operands):
            return Or(tuple(map_atoms(operand, change) for operand in operands))
    return change(predicate)


def renumber(predicate: Predicate, places: dict[int, int]) -> Predicate:
    """The predicate with its tensors at new places."""

    def moved(atom: Predicate) -> Predicate:
        match atom:
            case Same(query_tensor, key_tensor):
                return Same(places[query_tensor], places[key_tensor])
            case Lengths(number) | Keys(number) | Rows(number) | Dense(number) | Bits(number):
                return type(atom)(places[number])
        return atom

    return map_atoms(predicate, moved)
