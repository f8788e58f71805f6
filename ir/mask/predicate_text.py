"""``parse``: the inverse of the text form of predicates."""

from __future__ import annotations

import re

from regraft.ir.mask.predicate import (
    EVERYTHING,
    NOTHING,
    And,
    Bits,
    Dense,
    Keys,
    Lengths,
    Not,
    Or,
    Predicate,
    Rows,
    Same,
    band,
    chunk,
    heads,
    prefix,
)

_TOKEN = re.compile(r"\s*(?:([a-z]+)\(([^()]*)\)|(all|none)\b|([&|~()]))")
_TENSOR_ATOMS = {"keys": Keys, "rows": Rows, "lengths": Lengths, "dense": Dense, "bits": Bits}


def parse(text: str) -> Predicate:
    """A predicate from its text; ValueError says where it is not one."""
    parser = _Parser(text)
    result = parser.either()
    parser.expect_end()
    return result


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text.rstrip()
        self._position = 0

    def _peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self._text, self._position)

    def _accept(self, mark: str) -> bool:
        match = self._peek()
        if match is None or match.group(4) != mark:
            return False
        self._position = match.end()
        return True

    def _fail(self) -> ValueError:
        return ValueError(f"not a predicate at character {self._position}: {self._text!r}")

    def expect_end(self) -> None:
        if self._position != len(self._text):
            raise self._fail()

    def either(self) -> Predicate:
        operands = [self._all()]
        while self._accept("|"):
            operands.append(self._all())
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _all(self) -> Predicate:
        operands = [self._one()]
        while self._accept("&"):
            operands.append(self._one())
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _one(self) -> Predicate:
        if self._accept("~"):
            return Not(self._one())
        if self._accept("("):
            inner = self.either()
            if not self._accept(")"):
                raise self._fail()
            return inner
        match = self._peek()
        if match is None or match.group(4):
            raise self._fail()
        try:
            result = self._atom(match)
        except (ValueError, TypeError) as problem:
            raise self._fail() from problem
        self._position = match.end()
        return result

    def _atom(self, match: re.Match[str]) -> Predicate:
        if match.group(3):
            return EVERYTHING if match.group(3) == "all" else NOTHING
        name = match.group(1)
        arguments = [item.strip() for item in match.group(2).split(",")]
        if name in _TENSOR_ATOMS and len(arguments) == 1:
            return _TENSOR_ATOMS[name](int(arguments[0]))
        if name == "same":
            query_tensor, key_tensor = arguments
            return Same(int(query_tensor), int(key_tensor))
        if name == "heads":
            first, last = arguments
            return heads(int(first), int(last))
        if name == "band":
            lower, upper = arguments
            return band(None if lower == "None" else lower, None if upper == "None" else upper)
        if name == "prefix" and len(arguments) == 1:
            return prefix(arguments[0])
        if name == "chunk" and len(arguments) in (1, 2):
            return chunk(int(arguments[0]), *arguments[1:])
        raise ValueError(name)
