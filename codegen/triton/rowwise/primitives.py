"""What a row-wise kernel is made of: operators of one element, and reductions of a row, as text for the device.

Floating-point numbers are computed in fp32, and rounded to the element type of each result that the graph holds in
less: a kernel rounds where the graph rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import arguments, dtype
from regraft.ir.pointwise import is_cast

aten = torch.ops.aten


@dataclass(frozen=True)
class Pointwise:
    """An operator of one element. ``text`` has the operands at ``{0}``, ``{1}``…; ``exact`` says that a result of
    operands in a type is of this type without rounding, ``costly`` that it is worth keeping rather than doing again,
    ``helpers`` the device functions that the text calls."""

    text: str
    exact: bool = False
    costly: bool = False
    helpers: tuple[str, ...] = ()


def _exact(text: str) -> Pointwise:
    return Pointwise(text, exact=True)


def _costly(text: str, *helpers: str) -> Pointwise:
    return Pointwise(text, costly=True, helpers=helpers)


_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

#: Operator -> text, by its name without the overload; operands are the tensors and numbers in the schema's order.
POINTWISE: dict[str, Pointwise] = {
    "add": Pointwise("{0} + {1}"),
    "sub": Pointwise("{0} - {1}"),
    "rsub": Pointwise("{1} - {0}"),
    "mul": Pointwise("{0} * {1}"),
    "div": Pointwise("{0} / {1}"),
    "neg": _exact("-{0}"),
    "abs": _exact("tl.abs({0})"),
    "reciprocal": Pointwise("1.0 / {0}"),
    "sqrt": Pointwise("tl.sqrt({0})"),
    "rsqrt": Pointwise("tl.rsqrt({0})"),
    "square": Pointwise("{0} * {0}"),
    "floor": _exact("tl.floor({0})"),
    "ceil": _exact("tl.ceil({0})"),
    "exp": _costly("tl.exp({0})"),
    "exp2": _costly("tl.exp2({0})"),
    "expm1": _costly("expm1({0})", "expm1"),
    "log": _costly("tl.log({0})"),
    "log2": _costly("tl.log2({0})"),
    "log1p": _costly("log1p({0})", "log1p"),
    "sin": _costly("tl.sin({0})"),
    "cos": _costly("tl.cos({0})"),
    "erf": _costly("tl.erf({0})"),
    "tanh": _costly("tanh({0})", "tanh"),
    "sigmoid": _costly("tl.sigmoid({0})"),
    "relu": _exact(_MAXIMUM.format("{0}", "0.0")),
    "silu": _costly("{0} * tl.sigmoid({0})"),
    "gelu": _costly("gelu({0})", "gelu"),
    "gelu_tanh": _costly("gelu_tanh({0})", "tanh", "gelu_tanh"),
    "mish": _costly("{0} * tanh(softplus({0}))", "tanh", "log1p", "softplus"),
    "maximum": _exact(_MAXIMUM),
    "minimum": _exact(_MINIMUM),
    "where": _exact("tl.where({0}, {1}, {2})"),
    "eq": _exact("{0} == {1}"),
    "ne": _exact("{0} != {1}"),
    "lt": _exact("{0} < {1}"),
    "le": _exact("{0} <= {1}"),
    "gt": _exact("{0} > {1}"),
    "ge": _exact("{0} >= {1}"),
    "isnan": _exact("{0} != {0}"),
    "logical_not": _exact("{0} == 0"),
    "logical_and": _exact("({0} != 0) & ({1} != 0)"),
    "logical_or": _exact("({0} != 0) | ({1} != 0)"),
    "logical_xor": _exact("({0} != 0) ^ ({1} != 0)"),
    "bitwise_and": _exact("{0} & {1}"),
    "bitwise_or": _exact("{0} | {1}"),
    "bitwise_xor": _exact("{0} ^ {1}"),
}

#: Result is a truth value, computed in the common type of the operands.
COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "isnan", "logical_not", "logical_and", "logical_or"))

#: Names of reductions over the last dim.
REDUCTIONS = ("sum", "mean", "amax", "amin")

#: Exponents of ``pow`` that are products and roots.
_POWERS = {
    2: Pointwise("{0} * {0}"),
    3: Pointwise("{0} * {0} * {0}"),
    4: Pointwise("({0} * {0}) * ({0} * {0})"),
    1: _exact("{0}"),
    0.5: Pointwise("tl.sqrt({0})"),
    -0.5: Pointwise("tl.rsqrt({0})"),
    -1: Pointwise("1.0 / {0}"),
    -2: Pointwise("1.0 / ({0} * {0})"),
}


def operator_word(target: Any) -> str:
    """ "add" of ``aten.add.Tensor``; empty for what is no operator of ATen."""
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    space, _, name = target._schema.name.partition("::")
    return name if space == "aten" else ""


def is_copy(node: fx.Node) -> bool:
    """Whether a call changes no more than type or memory, and stays on its device."""
    return is_cast(node) and node.target is not aten.to.device


def pointwise(node: fx.Node) -> tuple[Pointwise, list[Any]] | None:
    """The text of a call and its operands, nodes and numbers, in order; None where there is no text for it."""
    given, word = arguments(node), operator_word(node.target)
    if is_copy(node):
        return _exact("{0}"), [given["self"]]
    if word == "bitwise_not":
        return _exact("{0} == 0" if dtype(node) == torch.bool else "~{0}"), [given["self"]]
    special = _SPECIAL.get(word)
    if special is not None:
        return special(given)
    entry = POINTWISE.get(word)
    if entry is None or given.get("rounding_mode") is not None or "out" in given:
        return None
    return entry, _operands(given)


def _operands(given: dict[str, Any]) -> list[Any]:
    return [value for name, value in given.items() if name not in ("alpha", "rounding_mode")]


def _power(given: dict[str, Any]) -> tuple[Pointwise, list[Any]] | None:
    entry = _POWERS.get(given["exponent"]) if isinstance(given.get("exponent"), (int, float)) else None
    return None if entry is None else (entry, [given["self"]])


def _gelu(given: dict[str, Any]) -> tuple[Pointwise, list[Any]]:
    return POINTWISE["gelu_tanh" if given["approximate"] == "tanh" else "gelu"], [given["self"]]


def _scaled(word: str, text: str) -> Any:
    def found(given: dict[str, Any]) -> tuple[Pointwise, list[Any]] | None:
        if given.get("alpha", 1) == 1:
            return POINTWISE[word], _operands(given)
        if not isinstance(given["alpha"], (int, float)):
            return None
        return Pointwise(text), [*_operands(given), given["alpha"]]

    return found


def _clamp(given: dict[str, Any]) -> tuple[Pointwise, list[Any]] | None:
    lowest, highest = given.get("min"), given.get("max")
    if lowest is None:
        return _exact(_MINIMUM), [given["self"], highest]
    if highest is None:
        return _exact(_MAXIMUM), [given["self"], lowest]
    return Pointwise("clamp({0}, {1}, {2})", exact=True, helpers=("clamp",)), [given["self"], lowest, highest]


def _hardtanh(given: dict[str, Any]) -> tuple[Pointwise, list[Any]] | None:
    return _clamp({"self": given["self"], "min": given["min_val"], "max": given["max_val"]})


def _leaky(given: dict[str, Any]) -> tuple[Pointwise, list[Any]]:
    return Pointwise("tl.where({0} > 0, {0}, {0} * {1})"), [given["self"], given["negative_slope"]]


def _elu(given: dict[str, Any]) -> tuple[Pointwise, list[Any]]:
    text = "tl.where({0} > 0, {0} * {2}, expm1({0} * {3}) * ({1} * {2}))"
    return _costly(text, "expm1"), [given[name] for name in ("self", "alpha", "scale", "input_scale")]


def _softplus(given: dict[str, Any]) -> tuple[Pointwise, list[Any]]:
    text = "tl.where({0} * {1} > {2}, {0}, softplus({0} * {1}) / {1})"
    return _costly(text, "log1p", "softplus"), [given[name] for name in ("self", "beta", "threshold")]


def _masked_fill(given: dict[str, Any]) -> tuple[Pointwise, list[Any]]:
    return _exact("tl.where({1}, {2}, {0})"), [given["self"], given["mask"], given["value"]]


#: Operators whose text depends on their arguments.
_SPECIAL: dict[str, Callable[[dict[str, Any]], tuple[Pointwise, list[Any]] | None]] = {
    "pow": _power,
    "gelu": _gelu,
    "add": _scaled("add", "{0} + {1} * {2}"),
    "sub": _scaled("sub", "{0} - {1} * {2}"),
    "rsub": _scaled("rsub", "{1} - {0} * {2}"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky,
    "elu": _elu,
    "softplus": _softplus,
    "masked_fill": _masked_fill,
}
