"""The text of masks: bounds of a row's keys and tests of pairs, for the kernel and for its reference.

Both name the same things: ``rows``, ``keys`` and ``head`` are indices, ``query_length`` and ``key_length`` runtime
integers, and ``mask_0_keys``, ``mask_0_rows``, … what is read of the mask's tensors.
"""

from __future__ import annotations

from regraft.ir.mask.length import KEY_LENGTH, QUERY_LENGTH, Length
from regraft.ir.mask.predicate import (
    And,
    Band,
    Bits,
    Chunk,
    Dense,
    Everything,
    Heads,
    Keys,
    Lengths,
    Not,
    Nothing,
    Or,
    Predicate,
    Prefix,
    Rows,
    Same,
)

_NAMES = {QUERY_LENGTH: "query_length", KEY_LENGTH: "key_length"}


def length_code(length: Length) -> str:
    """An affine length as an expression of ``query_length`` and ``key_length``."""
    text = str(length)
    for name, ours in _NAMES.items():
        text = text.replace(name, ours)
    return text


def shifted(base: str, length: Length) -> str:
    """``base + length`` as one reads it."""
    if length == Length():
        return base
    text = length_code(length)
    return f"{base} - {text[1:]}" if text.startswith("-") and not length.terms else f"{base} + {text}"


def bounds_code(bounds: tuple[Predicate, ...]) -> list[str]:
    """Statements that narrow ``start`` and ``end``, the keys that each of ``rows`` sees."""
    return [line for part in bounds for line in _narrowing(part)]


def _narrowing(part: Predicate) -> list[str]:
    match part:
        case Nothing():
            return ["end = start"]
        case Band(lower, upper):
            lines = [] if lower is None else [f"start = tl.maximum(start, {shifted('rows', lower)})"]
            return lines + ([] if upper is None else [f"end = tl.minimum(end, {shifted('rows', upper + 1)})"])
        case Prefix(length):
            return [f"end = tl.minimum(end, {length_code(length)})"]
        case Not(Prefix(length)):
            return [f"start = tl.maximum(start, {length_code(length)})"]
        case Lengths(number):
            return [f"end = tl.minimum(end, mask_{number}_length)"]
        case Not(Lengths(number)):
            return [f"start = tl.maximum(start, mask_{number}_length)"]
        case Chunk(size, offset):
            return [
                f"first = floor_divide({shifted('rows', offset)}, {size}) * {size}",
                "start = tl.maximum(start, first)",
                f"end = tl.minimum(end, first + {size})",
            ]
        case Rows(number):
            return [f"end = tl.where(mask_{number}_rows != 0, end, start)"]
        case Not(Rows(number)):
            return [f"end = tl.where(mask_{number}_rows == 0, end, start)"]
        case Heads(first, last):
            return [f"end = tl.where((head >= {first}) & (head < {last}), end, start)"]
        case Not(Heads(first, last)):
            return [f"end = tl.where((head >= {first}) & (head < {last}), start, end)"]
    raise TypeError(f"not a bound of keys: {part}")


def test_code(predicate: Predicate, device: bool, nested: bool = False) -> str:
    """A predicate as a boolean expression of ``rows`` (a column) and ``keys`` (a row).

    ``device``: in the kernel, where integer division of negative numbers is not Python's; else in the reference.
    """

    def visit(part: Predicate) -> str:
        return test_code(part, device, nested=True)

    def wrapped(text: str) -> str:
        return f"({text})" if nested else text

    match predicate:
        case Everything():
            return wrapped("keys == keys")
        case Nothing():
            return wrapped("keys != keys")
        case Band(lower, upper):
            sides = [] if lower is None else [f"keys - rows >= {length_code(lower)}"]
            sides += [] if upper is None else [f"keys - rows <= {length_code(upper)}"]
            return wrapped(sides[0] if len(sides) == 1 else f"({sides[0]}) & ({sides[1]})")
        case Prefix(length):
            return wrapped(f"keys < {length_code(length)}")
        case Lengths(number):
            return wrapped(f"keys < mask_{number}_length")
        case Keys(number):
            return wrapped(f"mask_{number}_keys != 0")
        case Rows(number):
            return wrapped(f"mask_{number}_rows != 0")
        case Same(left, right):
            return wrapped(f"mask_{left}_rows == mask_{right}_keys")
        case Chunk(size, offset):
            place = shifted("rows", offset)
            floor = f"floor_divide({place}, {size})" if device else f"({place}) // {size}"
            return wrapped(f"{floor} == keys // {size}")
        case Heads(first, last):
            return wrapped(f"(head >= {first}) & (head < {last})")
        case Bits(number):
            return wrapped(f"mask_{number}_bits != 0")
        case Dense(number):
            return wrapped(f"mask_{number}_pairs != 0")
        case Not(operand):
            return f"~{visit(operand)}"
        case And(operands) | Or(operands):
            mark = " & " if isinstance(predicate, And) else " | "
            return wrapped(mark.join(visit(operand) for operand in operands))
    raise TypeError(f"not a predicate: {predicate!r}")
