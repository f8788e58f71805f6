"""Handlers for arithmetic, comparisons, booleans, where, masked_fill and conversions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from regraft.ir.mask.expression import (
    ZERO,
    Apply,
    Expression,
    Load,
    Number,
    choices,
    const,
    index_dims,
    is_boolean,
    is_integer,
    leaves,
)
from regraft.ir.mask.interpret import Opaque, Reader, handles
from regraft.ir.mask.logic import (
    absolute,
    add,
    and_,
    boolean,
    equal,
    floor_divide,
    less,
    less_equal,
    map_choices,
    maximum,
    minimum,
    multiply,
    negate,
    not_,
    number,
    or_,
    subtract,
    where,
    xor,
)

_EXACT = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)


def _pair(reader: Reader) -> tuple[Expression, Expression]:
    return reader.elementwise("self"), reader.elementwise("other")


@handles("add")
def _add(reader: Reader) -> Expression:
    left, right = _pair(reader)
    if reader.value.dtype == torch.bool:
        return or_(left, right)
    return add(left, multiply(right, reader.expression("alpha")))


@handles("sub", "subtract")
def _subtract(reader: Reader) -> Expression:
    left, right = _pair(reader)
    return subtract(left, multiply(right, reader.expression("alpha")))


@handles("rsub")
def _reverse_subtract(reader: Reader) -> Expression:
    left, right = _pair(reader)
    return subtract(right, multiply(left, reader.expression("alpha")))


@handles("mul", "multiply")
def _multiply(reader: Reader) -> Expression:
    left, right = _pair(reader)
    return and_(left, right) if reader.value.dtype == torch.bool else multiply(left, right)


@handles("div", "divide", "true_divide")
def _divide(reader: Reader) -> Expression:
    if reader.raw("rounding_mode") == "floor":
        return _floor_divide(reader)
    left, right = _pair(reader)
    divisor = choices(right)
    if reader.raw("rounding_mode") is not None or divisor is None or len(divisor) != 1 or divisor[0] == 0:
        raise Opaque
    if choices(left) is None:
        raise Opaque  # a quotient of indices is rounded
    return map_choices(lambda value: value / divisor[0], left)


@handles("floor_divide")
def _floor_divide(reader: Reader) -> Expression:
    left, right = (number(side) for side in _pair(reader))
    if not (is_integer(left) and is_integer(right)) or reader.value.dtype.is_floating_point:
        raise Opaque
    return floor_divide(left, right)


@handles("neg", "negative")
def _negate(reader: Reader) -> Expression:
    return negate(reader.expression("self"))


@handles("abs", "absolute")
def _absolute(reader: Reader) -> Expression:
    return absolute(reader.expression("self"))


@handles("log")
def _log(reader: Reader) -> Expression:
    """log of a 0/1 mask is an additive mask of 0 and -inf."""
    value = number(reader.expression("self"))
    values = choices(value)
    if values is None or any(item not in (0, 1) for item in values):
        raise Opaque
    return map_choices(lambda item: 0.0 if item else -math.inf, value)


@handles("minimum", "maximum", "min", "max")
def _extreme(reader: Reader) -> Expression:
    if "other" not in reader:
        raise Opaque  # a reduction
    assert isinstance(reader.node.target, torch._ops.OpOverload)
    smaller = reader.node.target._schema.name.startswith("aten::min")
    return (minimum if smaller else maximum)(*_pair(reader))


@handles("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(reader: Reader) -> Expression:
    value = reader.elementwise("self")
    if "min" in reader:
        value = maximum(value, reader.elementwise("min"))
    return minimum(value, reader.elementwise("max")) if "max" in reader else value


def _comparison(compare: Callable[[Expression, Expression], Expression]) -> Callable[[Reader], Expression]:
    def handler(reader: Reader) -> Expression:
        left, right = _pair(reader)
        for name in ("self", "other"):
            operand = reader.raw(name)
            if isinstance(operand, torch.fx.Node) and reader.tensor(name).dtype not in _EXACT:
                _exact_choice(reader.read(operand))
        return _data_only(compare(left, right))

    return handler


def _exact_choice(value: Expression) -> None:
    """A comparison in a narrow type is exact only between small constants or on raw data (kept as data)."""
    values = choices(value)
    if not isinstance(value, Load) and (values is None or any(abs(item) > 127 for item in values)):
        raise Opaque


def _data_only(result: Expression) -> Expression:
    """Keep ``ids != pad`` as one boolean tensor: the predicates have no arithmetic on data.

    Left alone: indices against data (lengths), two reads of one tensor at different places (documents), and
    the test ``tensor != 0``, which the predicates read from the tensor itself.
    """
    found = leaves(result)
    places = {leaf.indices for leaf in found if isinstance(leaf, Load)}
    if not places or not all(isinstance(leaf, Load) or not index_dims(leaf) for leaf in found):
        return result
    if len(places) != 1 or _is_nonzero(result) or _is_nonzero(not_(result)):
        return result
    raise Opaque


def _is_nonzero(value: Expression) -> bool:
    if isinstance(value, Load):
        return True
    return (
        isinstance(value, Apply)
        and value.operator == "not"
        and isinstance(value.operands[0], Apply)
        and isinstance(value.operands[0].operands[0], Load)
        and (value.operands[0].operator == "eq" or value.operands[0].operands[1:] == (ZERO,))
        and value.operands[0].operator in ("eq", "float_eq")
    )


for _name, _compare in {
    "eq": equal,
    "ne": lambda left, right: not_(equal(left, right)),
    "le": less_equal,
    "lt": less,
    "ge": lambda left, right: less_equal(right, left),
    "gt": lambda left, right: less(right, left),
}.items():
    handles(_name)(_comparison(_compare))


def _bitwise(combine: Callable[[Expression, Expression], Expression]) -> Callable[[Reader], Expression]:
    def handler(reader: Reader) -> Expression:
        left, right = _pair(reader)
        if reader.value.dtype != torch.bool:
            raise Opaque
        return combine(boolean(left), boolean(right))

    return handler


_JUNCTIONS: dict[tuple[str, ...], Callable[[Expression, Expression], Expression]] = {
    ("bitwise_and", "__and__", "__iand__", "logical_and"): and_,
    ("bitwise_or", "__or__", "__ior__", "logical_or"): or_,
    ("bitwise_xor", "__xor__", "__ixor__", "logical_xor"): xor,
}
for _names, _combine in _JUNCTIONS.items():
    handles(*_names)(_bitwise(_combine))


@handles("logical_not", "bitwise_not")
def _not(reader: Reader) -> Expression:
    if reader.value.dtype != torch.bool:
        raise Opaque
    return not_(boolean(reader.expression("self")))


@handles("where")
def _where(reader: Reader) -> Expression:
    if "self" not in reader:
        raise Opaque  # the form which returns indices
    condition = boolean(reader.elementwise("condition"))
    return _choose(condition, *_pair(reader), reader.value.dtype)


@handles("masked_fill")
def _masked_fill(reader: Reader) -> Expression:
    mask = boolean(reader.elementwise("mask"))
    return _choose(mask, reader.elementwise("value"), reader.elementwise("self"), reader.value.dtype)


def _choose(condition: Expression, taken: Expression, other: Expression, dtype: torch.dtype) -> Expression:
    if dtype == torch.bool:
        return where(condition, boolean(taken), boolean(other))
    return where(condition, number(taken), number(other))


@handles("to", "_to_copy", "type_as")
def _convert(reader: Reader) -> Expression:
    value = reader.expression("self")
    source, target = reader.tensor("self").dtype, reader.value.dtype
    if source == target or is_boolean(value):
        return value
    if target == torch.bool:
        return _data_only(boolean(value))
    if choices(value) is not None:
        if target.is_floating_point:
            return value
        return map_choices(_truncate, value)
    if target in _EXACT and is_integer(value) and not isinstance(value, Load):
        return value
    raise Opaque  # the conversion may round; the converted tensor is kept


def _truncate(value: Number) -> Number:
    if not math.isfinite(value):
        raise Opaque
    return int(value)


@handles("contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "copy", "lift")
def _identity(reader: Reader) -> Expression:
    if "src" in reader:  # copy_: the value is that of the source
        return _choose(const(True), reader.elementwise("src"), ZERO, reader.value.dtype)
    return reader.expression("self")


@handles("dropout")
def _dropout(reader: Reader) -> Expression:
    if reader.raw("train") is not False:
        raise Opaque
    return reader.expression("input")
