"""What row-wise kernels are made of: operators of one element by name, with what a back end must know of each, and
reductions of a row.

The text or the instruction that an operator becomes is the back end's own.
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
class Primitive:
    """An operator of one element. ``exact`` says that a result of operands in a type is of this type without rounding,
    ``costly`` that it is worth keeping rather than doing again."""

    name: str
    exact: bool = False
    costly: bool = False


_ROUNDED = (
    "add", "sub", "rsub", "mul", "div", "reciprocal", "sqrt", "rsqrt", "square", "add_scaled", "sub_scaled",
    "rsub_scaled", "cube", "fourth_power", "inverse_square", "leaky_relu",
)  # fmt: skip
_EXACT = (
    "same", "neg", "abs", "floor", "ceil", "relu", "maximum", "minimum", "clamp", "where", "masked_fill",
    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "logical_not", "logical_and", "logical_or", "logical_xor",
    "bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor",
)  # fmt: skip
_COSTLY = (
    "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "erf", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh",
    "mish", "elu", "softplus",
)  # fmt: skip

#: Name -> primitive. A name that is an operator's of ATen takes the tensors and numbers of its schema, in order.
PRIMITIVES: dict[str, Primitive] = {
    **{name: Primitive(name) for name in _ROUNDED},
    **{name: Primitive(name, exact=True) for name in _EXACT},
    **{name: Primitive(name, costly=True) for name in _COSTLY},
}

#: Result is a truth value, computed in the common type of the operands.
COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "isnan", "logical_not", "logical_and", "logical_or"))

#: Names of reductions over the last dim.
REDUCTIONS = ("sum", "mean", "amax", "amin")

#: Exponents of ``pow`` that are products and roots.
_POWERS = {
    2: "square",
    3: "cube",
    4: "fourth_power",
    1: "same",
    0.5: "sqrt",
    -0.5: "rsqrt",
    -1: "reciprocal",
    -2: "inverse_square",
}

_Found = tuple[Primitive, list[Any]] | None


def operator_word(target: Any) -> str:
    """ "add" of ``aten.add.Tensor``; empty for what is no operator of ATen."""
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    space, _, name = target._schema.name.partition("::")
    return name if space == "aten" else ""


def is_copy(node: fx.Node) -> bool:
    """Whether a call changes no more than type or memory, and stays on its device."""
    return is_cast(node) and node.target is not aten.to.device


def pointwise(node: fx.Node) -> _Found:
    """The primitive that a call is and its operands, nodes and numbers, in order; None where it is none."""
    given, word = arguments(node), operator_word(node.target)
    if is_copy(node):
        return PRIMITIVES["same"], [given["self"]]
    if word == "bitwise_not":
        return PRIMITIVES["logical_not" if dtype(node) == torch.bool else "bitwise_not"], [given["self"]]
    special = _SPECIAL.get(word)
    if special is not None:
        return special(given)
    entry = PRIMITIVES.get(word)
    if entry is None or given.get("rounding_mode") is not None or "out" in given:
        return None
    return entry, _operands(given)


def _operands(given: dict[str, Any]) -> list[Any]:
    return [value for name, value in given.items() if name not in ("alpha", "rounding_mode")]


def _power(given: dict[str, Any]) -> _Found:
    name = _POWERS.get(given["exponent"]) if isinstance(given.get("exponent"), (int, float)) else None
    return None if name is None else (PRIMITIVES[name], [given["self"]])


def _gelu(given: dict[str, Any]) -> _Found:
    return PRIMITIVES["gelu_tanh" if given["approximate"] == "tanh" else "gelu"], [given["self"]]


def _scaled(word: str) -> Callable[[dict[str, Any]], _Found]:
    def found(given: dict[str, Any]) -> _Found:
        if given.get("alpha", 1) == 1:
            return PRIMITIVES[word], _operands(given)
        if not isinstance(given["alpha"], (int, float)):
            return None
        return PRIMITIVES[f"{word}_scaled"], [*_operands(given), given["alpha"]]

    return found


def _clamp(given: dict[str, Any]) -> _Found:
    lowest, highest = given.get("min"), given.get("max")
    if lowest is None:
        return PRIMITIVES["minimum"], [given["self"], highest]
    if highest is None:
        return PRIMITIVES["maximum"], [given["self"], lowest]
    return PRIMITIVES["clamp"], [given["self"], lowest, highest]


def _hardtanh(given: dict[str, Any]) -> _Found:
    return _clamp({"self": given["self"], "min": given["min_val"], "max": given["max_val"]})


def _named(primitive: str, *names: str) -> Callable[[dict[str, Any]], _Found]:
    return lambda given: (PRIMITIVES[primitive], [given[name] for name in names])


#: Operators whose primitive or operands depend on their arguments.
_SPECIAL: dict[str, Callable[[dict[str, Any]], _Found]] = {
    "pow": _power,
    "gelu": _gelu,
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": _scaled("rsub"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "hardtanh": _hardtanh,
    "leaky_relu": _named("leaky_relu", "self", "negative_slope"),
    "elu": _named("elu", "self", "alpha", "scale", "input_scale"),
    "softplus": _named("softplus", "self", "beta", "threshold"),
    "masked_fill": _named("masked_fill", "self", "mask", "value"),
}
