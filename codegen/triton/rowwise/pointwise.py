"""Operators of one element as text for the device.

Floating-point numbers are computed in fp32, and rounded to the element type of each result that the graph holds in
less: a kernel rounds where the graph rounds.
"""

from __future__ import annotations

from typing import NamedTuple


class Text(NamedTuple):
    """An operator's text, with the operands at ``{0}``, ``{1}``…, and the device functions that it calls
    (``helpers.py``)."""

    text: str
    helpers: tuple[str, ...] = ()


_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

#: Name of a primitive -> its text.
TEXTS: dict[str, Text] = {
    "same": Text("{0}"),
    "add": Text("{0} + {1}"),
    "add_scaled": Text("{0} + {1} * {2}"),
    "sub": Text("{0} - {1}"),
    "sub_scaled": Text("{0} - {1} * {2}"),
    "rsub": Text("{1} - {0}"),
    "rsub_scaled": Text("{1} - {0} * {2}"),
    "mul": Text("{0} * {1}"),
    "div": Text("{0} / {1}"),
    "neg": Text("-{0}"),
    "abs": Text("tl.abs({0})"),
    "reciprocal": Text("1.0 / {0}"),
    "sqrt": Text("tl.sqrt({0})"),
    "rsqrt": Text("tl.rsqrt({0})"),
    "square": Text("{0} * {0}"),
    "cube": Text("{0} * {0} * {0}"),
    "fourth_power": Text("({0} * {0}) * ({0} * {0})"),
    "inverse_square": Text("1.0 / ({0} * {0})"),
    "floor": Text("tl.floor({0})"),
    "ceil": Text("tl.ceil({0})"),
    "exp": Text("tl.exp({0})"),
    "exp2": Text("tl.exp2({0})"),
    "expm1": Text("expm1({0})", ("expm1",)),
    "log": Text("tl.log({0})"),
    "log2": Text("tl.log2({0})"),
    "log1p": Text("log1p({0})", ("log1p",)),
    "sin": Text("tl.sin({0})"),
    "cos": Text("tl.cos({0})"),
    "erf": Text("tl.erf({0})"),
    "tanh": Text("tanh({0})", ("tanh",)),
    "sigmoid": Text("tl.sigmoid({0})"),
    "relu": Text(_MAXIMUM.format("{0}", "0.0")),
    "leaky_relu": Text("tl.where({0} > 0, {0}, {0} * {1})"),
    "elu": Text("tl.where({0} > 0, {0} * {2}, expm1({0} * {3}) * ({1} * {2}))", ("expm1",)),
    "softplus": Text("tl.where({0} * {1} > {2}, {0}, softplus({0} * {1}) / {1})", ("log1p", "softplus")),
    "silu": Text("{0} * tl.sigmoid({0})"),
    "gelu": Text("gelu({0})", ("gelu",)),
    "gelu_tanh": Text("gelu_tanh({0})", ("tanh", "gelu_tanh")),
    "mish": Text("{0} * tanh(softplus({0}))", ("tanh", "log1p", "softplus")),
    "maximum": Text(_MAXIMUM),
    "minimum": Text(_MINIMUM),
    "clamp": Text("clamp({0}, {1}, {2})", ("clamp",)),
    "where": Text("tl.where({0}, {1}, {2})"),
    "masked_fill": Text("tl.where({1}, {2}, {0})"),
    "eq": Text("{0} == {1}"),
    "ne": Text("{0} != {1}"),
    "lt": Text("{0} < {1}"),
    "le": Text("{0} <= {1}"),
    "gt": Text("{0} > {1}"),
    "ge": Text("{0} >= {1}"),
    "isnan": Text("{0} != {0}"),
    "logical_not": Text("{0} == 0"),
    "logical_and": Text("({0} != 0) & ({1} != 0)"),
    "logical_or": Text("({0} != 0) | ({1} != 0)"),
    "logical_xor": Text("({0} != 0) ^ ({1} != 0)"),
    "bitwise_not": Text("~{0}"),
    "bitwise_and": Text("{0} & {1}"),
    "bitwise_or": Text("{0} | {1}"),
    "bitwise_xor": Text("{0} ^ {1}"),
}
