"""The expression domain: a tensor value as a function of its own indices.

``Index(-1)`` is the index of the last dimension, ``Index(-2)`` of the one before: counting from the right
makes broadcasting the identity. The index of a dimension of size 1 is the constant 0. Expressions are
immutable and interned, so equal expressions are the same object: comparison and hash cost nothing however
deep they are. They are built by the functions here and in ``logic``, which simplify; sums of integers are
kept as linear forms.

Numbers are real numbers. Where floating point differs (a NaN or infinity in a tensor, cancellation, narrow
types), a constructor does not simplify and the interpreter keeps the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar, cast
from weakref import WeakValueDictionary

import torch
import torch.fx

Number = int | float | bool

_table: WeakValueDictionary[tuple[object, ...], Expression] = WeakValueDictionary()
_serials = count()


@dataclass(frozen=True, eq=False)
class Expression:
    """The base of all expressions; ``depth`` and ``weight`` (its size as a tree) bound the cost of
    traversals."""

    serial: int = field(init=False, repr=False, default=0)
    depth: int = field(init=False, repr=False, default=1)
    weight: int = field(init=False, repr=False, default=1)

    @property
    def operands(self) -> tuple[Expression, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Index(Expression):
    """The index along dimension ``dim`` (negative: from the right); at least 0."""

    dim: int


@dataclass(frozen=True, eq=False)
class Const(Expression):
    value: Number


@dataclass(frozen=True, eq=False)
class Size(Expression):
    """A symbolic size by its text; ``positive``: known to be at least 1."""

    name: str
    positive: bool = True


@dataclass(frozen=True, eq=False)
class Load(Expression):
    """A tensor of the graph about which nothing is known, read at one index expression per dimension."""

    node: torch.fx.Node
    indices: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.indices

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.node.meta["val"].dtype)


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """``constant + sum(coefficient * term)``, terms ordered by age, no term a constant or a sum."""

    constant: int | float
    terms: tuple[tuple[Expression, int | float], ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return tuple(term for term, _ in self.terms)


@dataclass(frozen=True, eq=False)
class Apply(Expression):
    """An operator and its operands.

    Numbers: add (inexact), mul, floordiv, abs, min, max, where. Booleans: le (operand <= 0), eq (operand ==
    0), both on integers; float_le, float_lt, float_eq (two operands); and, or, not.
    """

    operator: str
    arguments: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.arguments


_Kind = TypeVar("_Kind", bound=Expression)


def _intern(kind: type[_Kind], *fields: object) -> _Kind:
    # 1, 1.0 and True are equal in Python but not here, hence the types in the key.
    key = (kind, fields, tuple(type(item) for item in fields))
    found = _table.get(key)
    if found is not None:
        return cast(_Kind, found)
    made = kind(*fields)
    object.__setattr__(made, "serial", next(_serials))
    if made.operands:
        object.__setattr__(made, "depth", 1 + max(operand.depth for operand in made.operands))
        object.__setattr__(made, "weight", 1 + sum(operand.weight for operand in made.operands))
    _table[key] = made
    return made


def index(dim: int) -> Index:
    return _intern(Index, dim)


def const(value: Number) -> Const:
    """A constant; a float which is a small integer is stored as that integer."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, float) and math.isnan(value):
        value = math.nan  # one object, so that all NaN constants are the same expression
    return _intern(Const, value)


def size(name: str, positive: bool = True) -> Size:
    return _intern(Size, name, positive)


def load(node: torch.fx.Node, indices: tuple[Expression, ...]) -> Load:
    return _intern(Load, node, indices)


def apply(operator: str, *arguments: Expression) -> Apply:
    return _intern(Apply, operator, arguments)


def by_age(arguments: set[Expression] | list[Expression]) -> list[Expression]:
    return sorted(arguments, key=lambda argument: argument.serial)


TRUE, FALSE, ZERO, ONE = const(True), const(False), const(0), const(1)
_BOOLEAN = frozenset({"le", "eq", "float_le", "float_lt", "float_eq", "and", "or", "not"})
_INTEGER_TYPES = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})


def is_boolean(expression: Expression) -> bool:
    match expression:
        case Const(value=value):
            return isinstance(value, bool)
        case Load():
            return expression.dtype == torch.bool
        case Apply(operator=operator):
            return operator in _BOOLEAN
    return False


def is_integer(expression: Expression) -> bool:
    """Whether the value is always an integer (a whole float counts); False means "not proved"."""
    match expression:
        case Index() | Size():
            return True
        case Const(value=value):
            return not isinstance(value, bool) and math.isfinite(value) and float(value).is_integer()
        case Load():
            return expression.dtype in _INTEGER_TYPES
        case Sum(constant=constant, terms=terms):
            whole = isinstance(constant, int) and all(isinstance(factor, int) for _, factor in terms)
            return whole and all(is_integer(term) for term, _ in terms)
        case Apply(operator="where", arguments=(_, left, right)):
            return is_integer(left) and is_integer(right)
        case Apply(operator="mul" | "floordiv" | "abs" | "min" | "max" | "add", arguments=arguments):
            return all(is_integer(argument) for argument in arguments)
    return False


def choices(expression: Expression) -> list[Number] | None:
    """The constants a value is chosen from (a constant, or nested ``where`` of constants); None if not
    such."""
    if isinstance(expression, Const):
        return [expression.value]
    if isinstance(expression, Apply) and expression.operator == "where":
        left, right = choices(expression.arguments[1]), choices(expression.arguments[2])
        return None if left is None or right is None else left + right
    return None


def linear(expression: Expression) -> tuple[int | float, dict[Expression, int | float]]:
    """Constant and terms of an expression seen as a sum."""
    match expression:
        case Const(value=value):
            return value, {}
        case Sum(constant=constant, terms=terms):
            return constant, dict(terms)
    return 0, {expression: 1}


def build_sum(constant: int | float, terms: Mapping[Expression, int | float]) -> Expression:
    kept = sorted(((term, factor) for term, factor in terms.items() if factor), key=lambda pair: pair[0].serial)
    if not kept:
        return const(constant)
    if isinstance(constant, float) and constant.is_integer() and abs(constant) < 2**53:
        constant = int(constant)
    if constant == 0 and len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return _intern(Sum, constant, tuple(kept))


def bounds(expression: Expression) -> tuple[float, float]:
    """Proved lower and upper bound of a number; infinite where nothing is known."""
    match expression:
        case Const(value=value):
            return (-math.inf, math.inf) if math.isnan(value) else (value, value)
        case Index():
            return 0, math.inf
        case Size(positive=positive):
            return (1 if positive else -math.inf), math.inf
        case Sum(constant=constant, terms=terms):
            low: float = constant
            high: float = constant
            for term, factor in terms:
                ends = [end * factor for end in bounds(term)]
                low, high = low + min(ends), high + max(ends)
            return low, high
        case Apply(operator="abs"):
            return 0, math.inf
        case Apply(operator="where", arguments=(_, left, right)):
            (left_low, left_high), (right_low, right_high) = bounds(left), bounds(right)
            return min(left_low, right_low), max(left_high, right_high)
        case Apply(operator="floordiv", arguments=(left, Const(value=divisor))) if divisor > 0:
            low, high = bounds(left)
            return (low // divisor if math.isfinite(low) else low), (high // divisor if math.isfinite(high) else high)
        case Apply(operator="min" | "max" as operator, arguments=(left, right)):
            chosen = min if operator == "min" else max
            (left_low, left_high), (right_low, right_high) = bounds(left), bounds(right)
            return chosen(left_low, right_low), chosen(left_high, right_high)
    return -math.inf, math.inf


def leaves(expression: Expression) -> list[Expression]:
    """Every Index, Size, Const and Load reached without entering the indices of a Load."""
    if isinstance(expression, Load) or not expression.operands:
        return [expression]
    return [leaf for operand in expression.operands for leaf in leaves(operand)]


def has_load(expression: Expression) -> bool:
    return any(isinstance(leaf, Load) for leaf in leaves(expression))


def index_dims(expression: Expression) -> frozenset[int]:
    """The dimensions on whose index the value may depend, those inside Load indices included."""
    if isinstance(expression, Index):
        return frozenset((expression.dim,))
    return frozenset().union(*(index_dims(operand) for operand in expression.operands))
