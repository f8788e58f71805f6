"""Smart constructors over ``expression``: arithmetic, comparisons, booleans and ``where``, each simplified.

Normal forms: integer comparisons become ``d <= 0`` or ``d == 0`` of one linear form; ``not`` is pushed to the
leaves (De Morgan); ``where`` of booleans becomes and/or; absolute values, minima, maxima and choices under a
comparison are split into cases.
"""

from __future__ import annotations

import math
import operator as operators
from collections.abc import Callable, Mapping
from functools import partial, reduce

from regraft.ir.mask.expression import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Apply,
    Const,
    Expression,
    Index,
    Load,
    Number,
    Sum,
    apply,
    bounds,
    build_sum,
    by_age,
    choices,
    const,
    is_boolean,
    is_integer,
    linear,
    load,
)

_SPLITS = frozenset({"abs", "min", "max", "where"})


def number(expression: Expression) -> Expression:
    """A boolean as 0 or 1; a number as itself."""
    return where(expression, ONE, ZERO) if is_boolean(expression) else expression


def boolean(expression: Expression) -> Expression:
    """A number as ``value != 0``; a boolean as itself."""
    return expression if is_boolean(expression) else not_(equal(expression, ZERO))


def map_choices(function: Callable[[Number], Number], expression: Expression) -> Expression:
    """``function`` applied to each constant of a tree of choices."""
    if isinstance(expression, Const):
        return const(function(expression.value))
    assert isinstance(expression, Apply) and expression.operator == "where"
    condition, left, right = expression.arguments
    return where(condition, map_choices(function, left), map_choices(function, right))


def add(left: Expression, right: Expression) -> Expression:
    left, right = number(left), number(right)
    for one, other in ((left, right), (right, left)):
        if isinstance(other, Const) and choices(one) is not None:
            return map_choices(partial(operators.add, other.value), one)
    (left_constant, left_terms), (right_constant, right_terms) = linear(left), linear(right)
    exact = is_integer(left) and is_integer(right)
    constant = left_constant + right_constant
    if not exact and (left_terms.keys() & right_terms.keys() or not math.isfinite(constant)):
        return apply("add", left, right)  # x - x of floats is NaN where x is infinite
    terms = dict(left_terms)
    for term, factor in right_terms.items():
        terms[term] = terms.get(term, 0) + factor
    return build_sum(constant, terms)


def negate(value: Expression) -> Expression:
    return multiply(value, const(-1))


def subtract(left: Expression, right: Expression) -> Expression:
    return add(left, negate(right))


def multiply(left: Expression, right: Expression) -> Expression:
    left, right = number(left), number(right)
    if isinstance(left, Const) or (choices(left) is not None and choices(right) is None):
        left, right = right, left
    if isinstance(right, Const):
        factor = right.value
        if choices(left) is not None:
            return map_choices(lambda value: value * factor, left)
        if factor == 1:
            return left
        if not math.isfinite(factor) or (factor == 0 and not is_integer(left)):
            return apply("mul", left, right)  # 0 * inf is NaN
        constant, terms = linear(left)
        return build_sum(constant * factor, {term: value * factor for term, value in terms.items()})
    if isinstance(right, Apply) and right.operator == "where" and is_integer(left) and is_integer(right):
        condition, taken, other = right.arguments
        return where(condition, multiply(left, taken), multiply(left, other))
    # The sign is pulled out of a product, so that slope * (q - k) and -(slope * (k - q)) are one form.
    sign = 1
    factors = []
    for side in (left, right):
        if isinstance(side, Sum) and side.terms[0][1] < 0:
            sign, side = -sign, negate(side)
        factors.append(side)
    product = apply("mul", *by_age(factors))
    return product if sign == 1 else build_sum(0, {product: -1})


def floor_divide(left: Expression, right: Expression) -> Expression:
    """Floor division of integers; the caller has checked that both are integers."""
    if isinstance(right, Const) and right.value != 0:
        if right.value == 1:
            return left
        if choices(left) is not None:
            divisor = right.value
            return map_choices(lambda value: value // divisor, left)
    return apply("floordiv", left, right)


def absolute(value: Expression) -> Expression:
    if choices(value) is not None:
        return map_choices(abs, value)
    low, high = bounds(value)
    if low >= 0:
        return value
    if high <= 0:
        return negate(value)
    if isinstance(value, Sum) and value.terms[0][1] < 0:
        value = negate(value)  # |q - k| and |k - q| are one form
    return apply("abs", value)


def minimum(left: Expression, right: Expression) -> Expression:
    return _extreme("min", left, right)


def maximum(left: Expression, right: Expression) -> Expression:
    return _extreme("max", left, right)


def _extreme(operator: str, left: Expression, right: Expression) -> Expression:
    left, right = number(left), number(right)
    if left is right:
        return left
    chosen: Callable[[Number, Number], Number] = min if operator == "min" else max
    for one, other in ((left, right), (right, left)):
        values = choices(one)
        if isinstance(other, Const) and values is not None and not any(math.isnan(x) for x in [*values, other.value]):
            return map_choices(partial(chosen, other.value), one)
    if is_integer(left) and is_integer(right):
        low, high = bounds(subtract(left, right))
        if low >= 0:
            return right if operator == "min" else left
        if high <= 0:
            return left if operator == "min" else right
    return apply(operator, *by_age([left, right]))


def less_equal(left: Expression, right: Expression) -> Expression:
    return _compare("float_le", left, right)


def less(left: Expression, right: Expression) -> Expression:
    return _compare("float_lt", left, right)


def equal(left: Expression, right: Expression) -> Expression:
    return _compare("float_eq", left, right)


_FOLD: Mapping[str, Callable[[Number, Number], bool]] = {
    "float_le": lambda left, right: left <= right,
    "float_lt": lambda left, right: left < right,
    "float_eq": lambda left, right: left == right,
}


def _compare(operator: str, left: Expression, right: Expression) -> Expression:
    left, right = number(left), number(right)
    if isinstance(left, Const) and isinstance(right, Const):
        return const(_FOLD[operator](left.value, right.value))
    for one, other, swapped in ((left, right, False), (right, left, True)):
        if isinstance(one, Apply) and one.operator == "where" and isinstance(other, Const):
            cases = [
                _compare(operator, other, case) if swapped else _compare(operator, case, other)
                for case in one.arguments[1:]
            ]
            return where(one.arguments[0], *cases)
    if is_integer(left) and is_integer(right):
        difference = subtract(left, right)
        if operator == "float_eq":
            return _zero(difference)
        return _nonpositive(difference if operator == "float_le" else add(difference, ONE))
    for one, other, swapped in ((left, right, False), (right, left, True)):
        if is_integer(one) and isinstance(other, Const) and not math.isnan(other.value):
            # An integer against a fraction or an infinity: only the order matters.
            if operator == "float_eq":
                return FALSE
            if math.isinf(other.value):
                return const((other.value > 0) != swapped)
            edge = const(math.ceil(other.value) if swapped else math.floor(other.value))
            return less_equal(edge, one) if swapped else less_equal(one, edge)
    return apply(operator, left, right)


def _split(difference: Expression, rebuild: Callable[[Expression], Expression], ordered: bool) -> Expression | None:
    """A comparison of a sum with one abs, min, max or where, by cases; None if there is none, or too many."""
    constant, terms = linear(difference)
    found = [term for term in terms if isinstance(term, Apply) and term.operator in _SPLITS]
    if not ordered:
        found = [term for term in found if term.operator == "where"]
    if not found or len(found) > 3:
        return None
    term = found[0]
    assert isinstance(term, Apply)
    factor = terms.pop(term)
    rest = build_sum(constant, terms)

    def case(value: Expression) -> Expression:
        return rebuild(add(multiply(value, const(factor)), rest))

    if term.operator == "where":
        return where(term.arguments[0], case(term.arguments[1]), case(term.arguments[2]))
    values = (term.arguments[0], negate(term.arguments[0])) if term.operator == "abs" else term.arguments
    largest = (term.operator != "min") == (factor > 0)  # the sum is the larger of its cases
    return (and_ if largest else or_)(case(values[0]), case(values[1]))


def _nonpositive(difference: Expression) -> Expression:
    low, high = bounds(difference)
    if high <= 0:
        return TRUE
    if low > 0:
        return FALSE
    cases = _split(difference, _nonpositive, ordered=True)
    if cases is not None:
        return cases
    constant, terms = linear(difference)
    divisor = reduce(math.gcd, (int(factor) for factor in terms.values()))
    if divisor > 1:
        reduced = {term: int(factor) // divisor for term, factor in terms.items()}
        return _nonpositive(build_sum(-((-int(constant)) // divisor), reduced))
    return apply("le", difference)


def _zero(difference: Expression) -> Expression:
    if isinstance(difference, Const):
        return const(difference.value == 0)
    low, high = bounds(difference)
    if low > 0 or high < 0:
        return FALSE
    cases = _split(difference, _zero, ordered=False)
    if cases is not None:
        return cases
    constant, terms = linear(difference)
    extremes = [term for term in terms if isinstance(term, Apply) and term.operator in _SPLITS]
    if 0 < len(extremes) <= 2:
        return and_(_nonpositive(difference), _nonpositive(negate(difference)))
    divisor = reduce(math.gcd, (int(factor) for factor in terms.values()))
    if int(constant) % divisor:
        return FALSE
    if next(iter(terms.values())) < 0:
        divisor = -divisor
    return apply("eq", build_sum(int(constant) // divisor, {term: int(f) // divisor for term, f in terms.items()}))


def not_(value: Expression) -> Expression:
    match value:
        case Const(value=constant):
            return const(not constant)
        case Apply(operator="not", arguments=(inner,)):
            return inner
        case Apply(operator="and", arguments=parts):
            return or_(*(not_(part) for part in parts))
        case Apply(operator="or", arguments=parts):
            return and_(*(not_(part) for part in parts))
        case Apply(operator="le", arguments=(difference,)):
            return _nonpositive(subtract(ONE, difference))
    return apply("not", value)


def and_(*parts: Expression) -> Expression:
    return _junction("and", "or", TRUE, FALSE, parts)


def or_(*parts: Expression) -> Expression:
    return _junction("or", "and", FALSE, TRUE, parts)


def _junction(operator: str, dual: str, neutral: Const, absorbing: Const, parts: tuple[Expression, ...]) -> Expression:
    flat: set[Expression] = set()
    for part in parts:
        inner = part.arguments if isinstance(part, Apply) and part.operator == operator else (part,)
        flat.update(inner)
    flat.discard(neutral)
    if absorbing in flat or any(not_(part) in flat for part in flat if not _is(part, dual)):
        return absorbing
    # Absorption: a & (a | b) = a.
    kept = {part for part in flat if not (_is(part, dual) and flat.intersection(part.operands))}
    if not kept:
        return neutral
    ordered = by_age(kept)
    return ordered[0] if len(ordered) == 1 else apply(operator, *ordered)


def _is(expression: Expression, operator: str) -> bool:
    return isinstance(expression, Apply) and expression.operator == operator


def xor(left: Expression, right: Expression) -> Expression:
    return or_(and_(left, not_(right)), and_(not_(left), right))


def where(condition: Expression, taken: Expression, other: Expression) -> Expression:
    if isinstance(condition, Const):
        return taken if condition.value else other
    if taken is other:
        return taken
    if is_boolean(taken) and is_boolean(other):
        return or_(and_(condition, taken), and_(not_(condition), other))
    taken, other = number(taken), number(other)
    if _is(condition, "not"):
        condition, taken, other = condition.operands[0], other, taken
    # Nested choices which share a value are one choice.
    if _is(other, "where"):
        inner, first, second = other.operands
        if second is taken:
            return where(and_(not_(condition), inner), first, taken)
        if first is taken:
            return where(or_(condition, inner), taken, second)
    if _is(taken, "where"):
        inner, first, second = taken.operands
        if second is other:
            return where(and_(condition, inner), first, other)
        if first is other:
            return where(and_(condition, not_(inner)), second, other)
    return apply("where", condition, taken, other)


_REBUILD: Mapping[str, Callable[..., Expression]] = {
    "add": add, "mul": multiply, "floordiv": floor_divide, "abs": absolute, "min": minimum, "max": maximum,
    "where": where, "and": and_, "or": or_, "not": not_, "le": _nonpositive, "eq": _zero,
    "float_le": less_equal, "float_lt": less, "float_eq": equal,
}  # fmt: skip


def substitute(expression: Expression, values: Mapping[int, Expression]) -> Expression:
    """The expression with ``Index(dim)`` replaced by ``values[dim]`` (all at once), simplified again."""
    if not values or all(isinstance(value, Index) and value.dim == dim for dim, value in values.items()):
        return expression
    done: dict[Expression, Expression] = {}

    def visit(current: Expression) -> Expression:
        if current in done:
            return done[current]
        result = current
        if isinstance(current, Index):
            result = values.get(current.dim, current)
        elif current.operands:
            operands = tuple(visit(operand) for operand in current.operands)
            if operands != current.operands:
                result = _rebuild(current, operands)
        done[current] = result
        return result

    return visit(expression)


def _rebuild(current: Expression, operands: tuple[Expression, ...]) -> Expression:
    if isinstance(current, Load):
        return load(current.node, operands)
    if isinstance(current, Sum):
        result: Expression = const(current.constant)
        for operand, (_, factor) in zip(operands, current.terms, strict=True):
            result = add(result, multiply(operand, const(factor)))
        return result
    assert isinstance(current, Apply)
    return _REBUILD[current.operator](*operands)
