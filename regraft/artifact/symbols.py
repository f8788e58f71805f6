"""Symbolic sizes as JSON, without text that would have to be parsed.

An expression is an int, a symbol's name, or ``[function, argument, …]`` with a function of a fixed table.
Nothing is evaluated or looked up by name outside that table. (``torch.export``'s own format gives its text to
``sympify``, which evaluates it.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from sympy.logic.boolalg import BooleanAtom  # type: ignore[import-untyped]
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from regraft.artifact.errors import ArtifactError

_SHARED = (
    "FloorDiv ModularIndexing Mod PythonMod CeilDiv CeilToInt FloorToInt TruncToInt RoundToInt PowByNatural FloatPow "
    "FloatTrueDiv IntTrueDiv ToFloat TruncToFloat Max Min Where LShift RShift Identity OpaqueUnaryFn_sqrt"
)
_FUNCTIONS: dict[str, Any] = {
    **{name: getattr(functions, name) for name in _SHARED.split() if hasattr(functions, name)},
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
    "Lt": sympy.Lt,
    "Le": sympy.Le,
    "Gt": sympy.Gt,
    "Ge": sympy.Ge,
    "And": sympy.And,
    "Or": sympy.Or,
    "Not": sympy.Not,
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LARGEST_EXPONENT = 16


def encode(expression: Any) -> Any:
    """An expression or a plain number as JSON; ``ArtifactError`` for a function not in the table."""
    if isinstance(expression, (bool, BooleanAtom)):
        return bool(expression)
    if isinstance(expression, (int, sympy.Integer)):
        return int(expression)
    if expression in (int_oo, sympy.oo):
        return ["infinity"]
    if expression in (-int_oo, -sympy.oo):
        return ["-infinity"]
    if isinstance(expression, sympy.Symbol):
        return expression.name
    if isinstance(expression, sympy.Rational):
        return ["rational", int(expression.p), int(expression.q)]
    if isinstance(expression, (float, sympy.Float)):
        return ["float", float(expression).hex()]
    name = _NAMES.get(type(expression))
    if name is None:
        raise ArtifactError(
            f"the symbolic size {expression} uses {type(expression).__name__}, which artifacts cannot store; "
            "capture the model with fixed sizes there"
        )
    return [name, *(encode(argument) for argument in expression.args)]


class Symbols:
    """Reads expressions and makes symbolic sizes of them in one new shape environment."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.shape_env = ShapeEnv()
        self._symbols: dict[str, Any] = {}
        for name, entry in table.items():
            self._symbols[name] = self._declare(name, entry)

    def decode(self, data: Any) -> Any:
        """Inverse of :func:`encode`; raises ``ArtifactError`` for anything that it would not have written."""
        if isinstance(data, bool):
            return sympy.true if data else sympy.false
        if isinstance(data, int):
            return sympy.Integer(data)
        if isinstance(data, str) and data in self._symbols:
            return self._symbols[data]
        if isinstance(data, list) and data and isinstance(data[0], str):
            return self._call(data[0], data[1:])
        raise ArtifactError(f"a symbolic size is malformed ({str(data)[:80]}); save the model again")

    def integer(self, data: Any) -> Any:
        """An int, or a symbolic int of an expression."""
        if type(data) is int:
            return data
        expression = self.decode(data)
        return self.shape_env.create_symintnode(expression, hint=_integer(self._hint(expression)))

    def floating(self, data: Any) -> Any:
        """A symbolic float of an expression."""
        expression = self.decode(data)
        hint = self._hint(expression)
        return self.shape_env.create_symfloatnode(expression, hint=None if hint is None else float(hint))

    def boolean(self, data: Any) -> Any:
        """A symbolic bool of an expression."""
        return self.shape_env.create_symboolnode(self.decode(data))

    def range(self, data: Any) -> ValueRanges[Any]:
        """A range ``[lower, upper]`` of expressions."""
        lower, upper = data
        return ValueRanges(self.decode(lower), self.decode(upper))

    def _declare(self, name: str, entry: dict[str, Any]) -> Any:
        if not _SYMBOL.fullmatch(name):
            raise ArtifactError(f"{name!r} is not the name of a symbolic size; do not trust this file")
        assumptions = {"integer": True} | {key: True for key in ("positive", "nonnegative") if entry[key] is True}
        symbol = sympy.Symbol(name, **assumptions)
        if entry["hint"] is not None:
            add = getattr(self.shape_env, "add_backed_var_to_val", None) or self.shape_env.add_var_to_val
            add(symbol, int(entry["hint"]))
        limits = self.range(entry["range"])
        self.shape_env.constrain_symbol_range(symbol, compiler_min=limits.lower, compiler_max=limits.upper)
        return symbol

    def _call(self, name: str, arguments: list[Any]) -> Any:
        if name in ("infinity", "-infinity"):
            return int_oo if name == "infinity" else -int_oo
        if name == "rational":
            return sympy.Rational(int(arguments[0]), int(arguments[1]))
        if name == "float":
            return sympy.Float(float.fromhex(arguments[0]))
        if name not in _FUNCTIONS:
            raise ArtifactError(
                f"a symbolic size uses {name[:40]!r}, which artifacts do not have; do not trust this file"
            )
        values = [self.decode(argument) for argument in arguments]
        if name in ("Pow", "PowByNatural", "FloatPow", "LShift") and not _is_small(values[-1]):
            raise ArtifactError("a symbolic size has a huge exponent; do not trust this file")
        return _FUNCTIONS[name](*values)

    def _hint(self, expression: Any) -> Any:
        known = self.shape_env.backed_var_to_val
        if not expression.free_symbols <= known.keys():
            return None
        return expression.xreplace(known)


def describe(symbols: Iterable[Any], shape_env: ShapeEnv) -> dict[str, Any]:
    """The table that :class:`Symbols` reads: hint (the size in the example), range and sign of each."""
    table: dict[str, Any] = {}
    for symbol in sorted(symbols, key=lambda s: str(s.name)):
        if not symbol.is_integer:
            raise ArtifactError(f"the model has a symbolic float {symbol}; capture it with a fixed number there")
        hint = shape_env.backed_var_to_val.get(symbol)
        limits = shape_env.var_to_range.get(symbol, ValueRanges(-int_oo, int_oo))
        table[symbol.name] = {
            "hint": None if hint is None else int(hint),
            "range": [encode(limits.lower), encode(limits.upper)],
            "positive": symbol.is_positive is True,
            "nonnegative": symbol.is_nonnegative is True,
        }
    return table


def free_symbols(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> set[Any]:
    """Symbols in a symbolic number."""
    return set(value.node.expr.free_symbols)


def _is_small(exponent: Any) -> bool:
    return isinstance(exponent, sympy.Rational) and bool(abs(exponent) <= _LARGEST_EXPONENT)


def _integer(hint: Any) -> int | None:
    return None if hint is None else int(hint)
