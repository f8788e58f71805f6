"""Handlers for tensors made from nothing: arange, full, ones, zeros and their relatives, tril and triu."""

from __future__ import annotations

from regraft.ir.mask.expression import ONE, ZERO, Expression, const, index, is_integer
from regraft.ir.mask.interpret import Opaque, Reader, handles
from regraft.ir.mask.logic import add, less_equal, multiply, number, subtract, where


@handles("arange")
def _arange(reader: Reader) -> Expression:
    start = reader.expression("start") if "start" in reader else ZERO
    step = reader.expression("step") if "step" in reader else ONE
    if not (is_integer(start) and is_integer(step)):
        raise Opaque
    return add(start, multiply(step, index(-1)))


@handles("ones", "ones_like", "new_ones")
def _ones(reader: Reader) -> Expression:
    return ONE


@handles("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(reader: Reader) -> Expression:
    return ZERO


@handles("full", "full_like", "new_full")
def _full(reader: Reader) -> Expression:
    return reader.expression("fill_value")


@handles("fill")
def _fill(reader: Reader) -> Expression:
    return reader.expression("value")


@handles("scalar_tensor")
def _scalar(reader: Reader) -> Expression:
    return reader.expression("s")


@handles("tril")
def _tril(reader: Reader) -> Expression:
    offset = subtract(index(-1), index(-2))
    return where(less_equal(offset, _diagonal(reader)), number(reader.expression("self")), ZERO)


@handles("triu")
def _triu(reader: Reader) -> Expression:
    offset = subtract(index(-1), index(-2))
    return where(less_equal(_diagonal(reader), offset), number(reader.expression("self")), ZERO)


def _diagonal(reader: Reader) -> Expression:
    value = reader.expression("diagonal")
    return value if is_integer(value) else const(reader.integer("diagonal"))
