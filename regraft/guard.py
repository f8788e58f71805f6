"""What a compiled entry was built for, and whether a call fits: structure, shapes, element types, devices, scalars.

A call is turned into a key. Equal keys run the same code, so a call seen before costs one look-up. A key that is
new is checked against entries with symbolic sizes by ``SymbolicGuard``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils._sympy.value_ranges import ValueRanges

from regraft.ir.conditions import conditions_of
from regraft.ir.program import Program

_SCALARS = frozenset(
    {
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(None),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
    }
)
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = _SCALARS | _TENSORS


class UnsupportedInput(TypeError):
    """An input that no program can take: a tensor subclass, a lazily negated or conjugated view, or an object that is
    not a pytree node."""


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Any]]:
    """The structure of a call and its leaves; keyword arguments in alphabetical order, so that their order is free.

    A call without nesting has the structure (number of positional arguments, keyword names); finding that costs a
    fraction of a pytree traversal.
    """
    if len(kwargs) > 1:
        kwargs = dict(sorted(kwargs.items()))
    leaves = [*args, *kwargs.values()]
    for leaf in leaves:
        if type(leaf) not in _PLAIN:
            break
    else:
        return (len(args), *kwargs), _written_out(leaves)
    leaves, spec = tree_flatten((args, kwargs))
    for leaf in leaves:
        if type(leaf) not in _PLAIN:
            raise UnsupportedInput(
                f"an input is a {type(leaf).__name__}; tensors, numbers, strings, None and pytrees of them are compiled"
            )
    return spec, _written_out(leaves)


def _written_out(leaves: list[Any]) -> list[Any]:
    """The leaves, all of whose values are what their memory holds."""
    for leaf in leaves:
        if type(leaf) in _TENSORS and (leaf.is_neg() or leaf.is_conj()):
            raise UnsupportedInput(
                "an input is a view of memory that holds its values negated or conjugated, and compiled code reads "
                "memory; resolve_neg() and resolve_conj() write such a view out"
            )
    return leaves


def key_of(structure: Hashable, leaves: list[Any], strides: bool = False) -> Hashable:
    """What must be equal for two calls to run the same code when all sizes are static; ``strides``: these too."""
    parts: list[Any] = [structure]
    for leaf in leaves:
        if type(leaf) in _TENSORS:
            parts.append((leaf.shape, leaf.dtype, leaf.device, leaf.layout))
            if strides and leaf.layout is torch.strided:
                parts.append((leaf.stride(), leaf.storage_offset()))
        else:
            parts.append((type(leaf), _exact(leaf)))
    return tuple(parts)


def _exact(scalar: Any) -> Any:
    """A scalar by what computing with it gives: 0.0 and -0.0 are equal and divide into opposite infinities, and NaN
    equals nothing."""
    return repr(scalar) if type(scalar) in (float, complex) else scalar


def describe(leaves: Iterable[Any]) -> str:
    """Inputs in a sentence: ``float32[2, 16], 3``."""
    return ", ".join(map(_shown, leaves)) or "(none)"


def describe_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A call in a sentence: ``float32[2, 16], mask=bool[2, 16]``."""
    named = [f"{name}={describe(tree_leaves(value))}" for name, value in kwargs.items()]
    return ", ".join([*map(_shown, tree_leaves(args)), *named]) or "(none)"


def _shown(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    where = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{where}"


def leaf_order(in_spec: TreeSpec) -> tuple[Hashable, list[int]]:
    """The structure of calls that ``in_spec`` describes, and for each leaf of the program its place among
    the call's."""
    args, kwargs = tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    kwargs = dict(sorted(kwargs.items()))
    places, spec = tree_flatten((args, kwargs))
    nested = len(places) != len(args) + len(kwargs) or any(type(v) is not int for v in (*args, *kwargs.values()))
    order = [0] * len(places)
    for position, place in enumerate(places):
        order[place] = position
    return (spec if nested else (len(args), *kwargs)), order


class SymbolicGuard:
    """Whether leaves (in the program's order) fit a program whose sizes are partly symbolic."""

    def __init__(self, program: Program) -> None:
        self._wanted = [node.meta.get("val") for node in program.user_inputs()]
        self._names = [node.name for node in program.user_inputs()]
        self._example = program.example
        self._ranges = program.range_constraints
        self._reads_layout = program.reads_layout
        self._conditions = conditions_of(program)

    @property
    def symbolic(self) -> bool:
        """Whether any input has a symbolic size."""
        return next(self._sizes(), None) is not None

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the program computes the right thing for these inputs."""
        return self.sizes(leaves) is not None

    def narrow(self, ranges: Mapping[sympy.Symbol, tuple[int, int]]) -> None:
        """Let only sizes from the smallest to the largest of ``ranges`` fit; the program remembers it."""
        for symbol, bounds in ranges.items():
            self._ranges[symbol] = ValueRanges(*bounds) & self._ranges.get(symbol, ValueRanges(*bounds))

    def inner_sizes(self) -> list[sympy.Symbol]:
        """Symbolic sizes of other dims than the first, in which samples lie beside each other."""
        found = {symbol: None for _, dim, size in self._sizes() if dim for symbol in size.node.expr.free_symbols}
        return list(found)

    def place_of(self, symbol: sympy.Symbol) -> str:
        """An input and its dim that have a symbolic size, in words."""
        places = [(dim, name) for name, dim, size in self._sizes() if symbol in size.node.expr.free_symbols]
        dim, name = max(places)
        return f"dim {dim} of {name}"

    def _sizes(self) -> Iterator[tuple[str, int, torch.SymInt]]:
        """Name, dim and size of all that is symbolic in the inputs."""
        for name, value in zip(self._names, self._wanted, strict=True):
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                    yield name, dim, size

    def sizes(self, leaves: list[Any]) -> dict[sympy.Symbol, sympy.Integer] | None:
        """The symbolic sizes of inputs that fit; None for others."""
        known: dict[sympy.Symbol, sympy.Integer] = {}
        derived: list[tuple[Any, int]] = []
        for wanted, leaf, example in zip(self._wanted, leaves, self._example, strict=True):
            if not isinstance(wanted, Tensor):
                if type(leaf) is not type(example) or _exact(leaf) != _exact(example):
                    return None
            elif not isinstance(leaf, Tensor) or not self._fits_tensor(wanted, leaf, known, derived):
                return None
        held = (
            all(_value(expression, known) == size for expression, size in derived)
            and all(self._in_range(expression, known) for expression in self._ranges)
            and all(_value(condition, known) == sympy.true for condition in self._conditions)
        )
        return known if held else None

    def _fits_tensor(self, wanted: Tensor, leaf: Tensor, known: dict[Any, Any], derived: list[tuple[Any, int]]) -> bool:
        if (wanted.dtype, wanted.device, wanted.layout) != (leaf.dtype, leaf.device, leaf.layout):
            return False
        if wanted.dim() != leaf.dim():
            return False
        for expected, size in zip(wanted.shape, leaf.shape, strict=True):
            expression = expected.node.expr if isinstance(expected, torch.SymInt) else None
            if expression is None:
                if expected != size:
                    return False
            elif isinstance(expression, sympy.Symbol):
                if known.setdefault(expression, sympy.Integer(size)) != size:
                    return False
            else:
                derived.append((expression, size))
                _solve(expression, size, known)
        if self._reads_layout:
            steps = [step.node.expr if isinstance(step, torch.SymInt) else step for step in wanted.stride()]
            derived += zip(steps, leaf.stride(), strict=True)
            derived.append((wanted.storage_offset(), int(leaf.storage_offset())))
        return True

    def _in_range(self, expression: Any, known: Mapping[Any, Any]) -> bool:
        value = _value(expression, known)
        bounds = self._ranges[expression]
        if not getattr(value, "is_Integer", False):
            return not expression.free_symbols & set(known)  # a symbol of an intermediate result, not of an input
        return bool(bounds.lower <= value <= bounds.upper)


def _solve(expression: Any, size: int, known: dict[Any, Any]) -> None:
    """Learn the symbol of a linear size such as ``2*s``; what stays unknown makes the guard refuse."""
    for symbol in expression.free_symbols - set(known):
        coefficient = expression.coeff(symbol, 1)
        rest = expression.coeff(symbol, 0)
        if coefficient.is_Integer and rest.is_Integer and expression == coefficient * symbol + rest:
            value = (sympy.Integer(size) - rest) / coefficient
            if value.is_Integer:
                known[symbol] = value


def _value(expression: Any, known: Mapping[Any, Any]) -> Any:
    return sympy.sympify(expression).xreplace(dict(known))
