"""Proof by enumeration, for static sizes: an expression of indices and constants compared on the whole [L, S]
grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from regraft.ir.mask.expression import Apply, Const, Expression, Index, Sum, index_dims, leaves
from regraft.ir.mask.predicate import EVERYTHING, NOTHING, Not, Predicate, band, prefix

MAX_GRID = 1 << 22
_Array = npt.NDArray[np.generic]


def predicate_on_grid(expression: Expression, query_length: int, key_length: int) -> Predicate | None:
    """The band or prefix which equals a boolean expression on every (query, key), or None."""
    if query_length * key_length > MAX_GRID or not index_dims(expression) <= {-1, -2}:
        return None
    if any(not isinstance(leaf, (Const, Index)) for leaf in leaves(expression)):
        return None
    try:
        value = _evaluate(expression, query_length, key_length)
    except OverflowError:
        return None
    visible = np.broadcast_to(np.asarray(value, dtype=bool), (query_length, key_length))
    if visible.all():
        return EVERYTHING
    if not visible.any():
        return NOTHING
    if (visible == visible[:1]).all():
        seen = np.flatnonzero(visible[0])
        if seen[0] == 0 and seen[-1] + 1 == seen.size:
            return prefix(int(seen.size))
        if seen[-1] + 1 == key_length and seen.size == key_length - seen[0]:
            return Not(prefix(int(seen[0])))
    offsets = np.arange(key_length) - np.arange(query_length)[:, None]
    lower, upper = int(offsets[visible].min()), int(offsets[visible].max())
    if not np.array_equal(visible, (offsets >= lower) & (offsets <= upper)):
        return None
    return band(None if lower <= 1 - query_length else lower, None if upper >= key_length - 1 else upper)


def _evaluate(expression: Expression, rows: int, columns: int) -> _Array:
    match expression:
        case Const(value=value):
            return np.asarray(value)
        case Index(dim=dim):
            return np.arange(columns) if dim == -1 else np.arange(rows)[:, None]
        case Sum(constant=constant, terms=terms):
            total: _Array = np.asarray(constant)
            for term, factor in terms:
                total = np.add(total, np.multiply(_evaluate(term, rows, columns), factor))
            return total
    assert isinstance(expression, Apply)
    values = [_evaluate(argument, rows, columns) for argument in expression.arguments]
    result: _Array
    match expression.operator:
        case "and":
            result = np.logical_and.reduce(np.broadcast_arrays(*values))
            return result
        case "or":
            result = np.logical_or.reduce(np.broadcast_arrays(*values))
            return result
        case "le":
            return np.less_equal(values[0], 0)
        case "eq":
            return np.equal(values[0], 0)
        case "where":
            return np.where(*values)
    functions: dict[str, np.ufunc] = {
        "add": np.add, "mul": np.multiply, "floordiv": np.floor_divide, "abs": np.absolute, "min": np.minimum,
        "max": np.maximum, "not": np.logical_not, "float_le": np.less_equal, "float_lt": np.less,
        "float_eq": np.equal,
    }  # fmt: skip
    result = functions[expression.operator](*values)
    return result
