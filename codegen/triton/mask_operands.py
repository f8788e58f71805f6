"""The tensors that a mask reads, as operands of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from regraft.ir.mask.predicate import And, Bits, Dense, Heads, Keys, Lengths, Not, Or, Predicate, Rows, Same

#: Ways of reading one tensor that ask for the same shape of it.
_TOGETHER = ({"keys", "rows"}, {"pairs"}, {"length"}, {"bits"})
#: Dims of a tensor by how it is read, in the names of its strides; the batch is repeated where the tensor has none.
_DIMS = {"pairs": ("batch", "head", "row", "key"), "bits": ("batch", "row", "word"), "length": ("batch",)}


@dataclass(frozen=True)
class MaskOperand:
    """A tensor of the mask and how it is read: as numbers of "keys" or "rows", of "pairs", "bits" of a row's words, or
    one "length" a batch. ``compared``: its values matter, not only whether they are 0."""

    number: int
    reads: frozenset[str]
    compared: bool

    @property
    def name(self) -> str:
        """Its name in emitted text."""
        return f"mask_{self.number}"

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of its dims, one a stride."""
        for how, dims in _DIMS.items():
            if how in self.reads:
                return dims
        return ("batch", "place")

    @property
    def kind(self) -> str:
        """The element type that a build ahead of time is for."""
        if "bits" in self.reads:
            return "*i64"
        return "*i32" if self.compared or "length" in self.reads else "*u8"

    @property
    def has_bits(self) -> bool:
        """Whether it holds words of bits."""
        return "bits" in self.reads

    def read_names(self) -> list[str]:
        """What a device function takes to test pairs with it."""
        names = {
            "length": [f"{self.name}_length"],
            "rows": [f"{self.name}_rows"],
            "keys": [self.name, f"{self.name}_stride_place"],
            "pairs": [f"{self.name}_tile", f"{self.name}_stride_key"],
            "bits": [f"{self.name}_tile", f"{self.name}_stride_word", f"{self.name}_words"],
        }
        return [name for how in sorted(self.reads) for name in names[how]]


def mask_operands(predicates: Iterable[Predicate]) -> list[MaskOperand]:
    """The tensors of some predicates, by their numbers."""
    found: dict[int, set[str]] = {}
    compared: set[int] = set()
    for atom in atoms(predicates):
        match atom:
            case Lengths(number):
                found.setdefault(number, set()).add("length")
            case Keys(number):
                found.setdefault(number, set()).add("keys")
            case Rows(number):
                found.setdefault(number, set()).add("rows")
            case Dense(number):
                found.setdefault(number, set()).add("pairs")
            case Bits(number):
                found.setdefault(number, set()).add("bits")
            case Same(left, right):
                found.setdefault(left, set()).add("rows")
                found.setdefault(right, set()).add("keys")
                compared |= {left, right}
    return [MaskOperand(number, frozenset(found[number]), number in compared) for number in sorted(found)]


def clash(operands: Iterable[MaskOperand]) -> str | None:
    """Why a tensor cannot be one operand: it is read as two shapes. None where all can."""
    for operand in operands:
        if not any(operand.reads <= ways for ways in _TOGETHER):
            return f"tensor {operand.number} of the mask is read as {' and as '.join(sorted(operand.reads))}"
    return None


def reads_head(predicates: Iterable[Predicate]) -> bool:
    """Whether any of the predicates differs from head to head by number."""
    return any(isinstance(atom, Heads) for atom in atoms(predicates))


def atoms(predicates: Iterable[Predicate]) -> Iterator[Predicate]:
    """The atoms of some predicates, in order."""
    for predicate in predicates:
        match predicate:
            case Not(operand):
                yield from atoms([operand])
            case And(operands) | Or(operands):
                yield from atoms(operands)
            case _:
                yield predicate
