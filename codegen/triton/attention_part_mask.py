"""The mask of a part of the keys, from the mask of all: the same predicate, in places that count from the part's first
key."""

from __future__ import annotations

from dataclasses import dataclass, field

from regraft.codegen.triton.attention_spec import Unsupported
from regraft.ir.mask.length import KEY_LENGTH, Length
from regraft.ir.mask.predicate import (
    And,
    Band,
    Bits,
    Chunk,
    Dense,
    Keys,
    Lengths,
    Not,
    Or,
    Predicate,
    Prefix,
    Rows,
    Same,
)


@dataclass
class PartMask:
    """The keys from ``first`` on of ``keys``. ``tensors`` are those of the part's predicate: the number of each among
    the mask's own, and how it is cut: along "keys", as "pairs", a "length" that counts from ``first``, or whole."""

    first: int
    keys: int
    tensors: list[tuple[int, str]] = field(default_factory=list)

    def of(self, predicate: Predicate) -> Predicate:
        """The predicate of the part; raises ``Unsupported`` where it has none."""
        match predicate:
            case And(operands):
                return And(tuple(map(self.of, operands)))
            case Or(operands):
                return Or(tuple(map(self.of, operands)))
            case Not(operand):
                return Not(self.of(operand))
            case Band(lower, upper):
                return Band(*(None if bound is None else self._length(bound) - self.first for bound in (lower, upper)))
            case Prefix(length):
                return Prefix(self._length(length) - self.first)
            case Chunk(size, offset):
                if self.first % size:
                    raise Unsupported(f"keys from {self.first} on do not begin with a chunk of {size}")
                return Chunk(size, self._length(offset) - self.first)
            case Keys(number):
                return Keys(self._tensor(number, "keys"))
            case Lengths(number):
                return Lengths(self._tensor(number, "length"))
            case Rows(number):
                return Rows(self._tensor(number, "whole"))
            case Same(left, right):
                return Same(self._tensor(left, "whole"), self._tensor(right, "keys"))
            case Dense(number):
                return Dense(self._tensor(number, "pairs"))
            case Bits():
                raise Unsupported("a tree of drafts is attended to as a whole")
        return predicate

    def _length(self, length: Length) -> Length:
        return length.substitute({KEY_LENGTH: Length(self.keys)})

    def _tensor(self, number: int, how: str) -> int:
        if (number, how) not in self.tensors:
            self.tensors.append((number, how))
        return self.tensors.index((number, how))
