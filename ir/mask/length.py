"""Affine integer lengths: the bounds of predicates, with constant or symbolic sizes.

A bound such as ``key_len - query_len + 1`` is kept as a constant and integer coefficients of named sizes, so
that two bounds can be compared without knowing any size. Every named size is taken to be at least 1:
``torch.export`` specialises sizes 0 and 1, and the interpreter refuses symbols which may be smaller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

QUERY_LENGTH = "query_len"
KEY_LENGTH = "key_len"

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][A-Za-z_0-9]*)|([-+*]))")


@dataclass(frozen=True, slots=True)
class Length:
    """``constant + sum(coefficient * name)``; the terms are sorted by name and have no zero coefficient."""

    constant: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(value: Length | int | str) -> Length:
        """A length from a number, from its text, or from itself."""
        if isinstance(value, Length):
            return value
        return Length(value) if isinstance(value, int) else parse_length(value)

    @staticmethod
    def build(constant: int, terms: Mapping[str, int]) -> Length:
        return Length(constant, tuple(sorted((name, factor) for name, factor in terms.items() if factor)))

    @property
    def is_constant(self) -> bool:
        return not self.terms

    def __add__(self, other: Length | int) -> Length:
        right = Length.of(other)
        terms = dict(self.terms)
        for name, factor in right.terms:
            terms[name] = terms.get(name, 0) + factor
        return Length.build(self.constant + right.constant, terms)

    def __neg__(self) -> Length:
        return self.scaled(-1)

    def __sub__(self, other: Length | int) -> Length:
        return self + (-Length.of(other))

    def scaled(self, factor: int) -> Length:
        return Length.build(self.constant * factor, {name: value * factor for name, value in self.terms})

    def at_least(self, other: Length | int) -> bool:
        """Proof that ``self >= other`` for all sizes >= 1; False means "not proved"."""
        difference = self - other
        if any(factor < 0 for _, factor in difference.terms):
            return False
        return difference.constant + sum(factor for _, factor in difference.terms) >= 0

    def substitute(self, values: Mapping[str, Length]) -> Length:
        result = Length(self.constant)
        for name, factor in self.terms:
            result = result + values.get(name, Length(0, ((name, 1),))).scaled(factor)
        return result

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The number, given the value of each name; KeyError names a missing one."""
        return self.constant + sum(factor * values[name] for name, factor in self.terms)

    def __str__(self) -> str:
        # Positive terms first: "key_len - query_len" reads better than "-query_len + key_len".
        ordered = sorted(self.terms, key=lambda term: (term[1] < 0, term[0]))
        pieces = [(factor, name if abs(factor) == 1 else f"{abs(factor)}*{name}") for name, factor in ordered]
        if self.constant or not pieces:
            pieces.append((self.constant, str(abs(self.constant))))
        sign, first = pieces[0]
        text = f"-{first}" if sign < 0 else first
        return text + "".join(f" {'-' if factor < 0 else '+'} {piece}" for factor, piece in pieces[1:])


ZERO_LENGTH = Length()


def symbol(name: str) -> Length:
    return Length(0, ((name, 1),))


def parse_length(text: str) -> Length:
    """The inverse of ``str``: sums of integers, names and ``integer*name``; ValueError otherwise."""
    tokens: list[str] = []
    position = 0
    source = text.rstrip()
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None:
            raise ValueError(f"not a length: {text!r}")
        tokens.append(match.group().strip())
        position = match.end()
    result, cursor = Length(), 0
    while cursor < len(tokens):
        sign = 1
        if tokens[cursor] in "+-":
            sign = -1 if tokens[cursor] == "-" else 1
            cursor += 1
        elif cursor:
            raise ValueError(f"not a length: {text!r}")
        if cursor >= len(tokens) or tokens[cursor] in "+-*":
            raise ValueError(f"not a length: {text!r}")
        factor, name = (int(tokens[cursor]), None) if tokens[cursor].isdigit() else (1, tokens[cursor])
        cursor += 1
        if name is None and tokens[cursor : cursor + 1] == ["*"]:
            if cursor + 1 >= len(tokens) or not (tokens[cursor + 1][0].isalpha() or tokens[cursor + 1][0] == "_"):
                raise ValueError(f"not a length: {text!r}")
            name = tokens[cursor + 1]
            cursor += 2
        result = result + (Length(sign * factor) if name is None else symbol(name).scaled(sign * factor))
    if not tokens:
        raise ValueError("an empty text is not a length")
    return result
