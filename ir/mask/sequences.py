"""Handlers for scans along a dimension whose argument is provably constant or arithmetic."""

from __future__ import annotations

from regraft.ir.mask.expression import (
    ONE,
    ZERO,
    Expression,
    Index,
    has_load,
    index,
    index_dims,
    is_integer,
    linear,
)
from regraft.ir.mask.interpret import Opaque, Reader, handles
from regraft.ir.mask.logic import add, equal, multiply, number, substitute, subtract, where


def _dim(reader: Reader) -> int:
    dim = reader.integer("dim")
    return dim if dim < 0 else dim - reader.value.dim()


@handles("cumsum")
def _cumulative_sum(reader: Reader) -> Expression:
    """cumsum of a value which does not change along the dimension: (i + 1) * value."""
    dim = _dim(reader)
    value = number(reader.expression("self"))
    if value is ZERO:
        return ZERO
    if not is_integer(value) or has_load(value) or dim in index_dims(value):
        raise Opaque
    return multiply(value, add(index(dim), ONE))


@handles("diff")
def _difference(reader: Reader) -> Expression:
    """First differences; with ``prepend`` the first one is taken against it.

    Hugging Face detects packed sequences by diff(position_ids, prepend=position_ids[:, :1] - 1) != 1: for
    positions made by arange every difference is 1, the first included.
    """
    dim = _dim(reader)
    value = number(reader.expression("self"))
    _, terms = linear(value)
    if reader.integer("n") != 1 or "append" in reader or not is_integer(value) or has_load(value):
        raise Opaque
    if any(not isinstance(term, Index) and dim in index_dims(term) for term in terms):
        raise Opaque
    if "prepend" not in reader:
        return subtract(substitute(value, {dim: add(index(dim), ONE)}), value)
    before = number(reader.expression("prepend"))
    extent = reader.tensor("prepend").shape[dim]
    if not isinstance(extent, int) or extent != 1 or not is_integer(before):
        raise Opaque
    later = subtract(value, substitute(value, {dim: subtract(index(dim), ONE)}))
    first = subtract(substitute(value, {dim: ZERO}), before)
    return where(equal(index(dim), ZERO), first, later)
