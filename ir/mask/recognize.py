"""``recognize_mask``: what a mask tensor means, as a predicate, a fill and a residual bias.

Nothing is assumed. A mask which is not understood comes back as a tensor (``dense`` or a tensor bias), so the
form always means exactly the tensor; only a tensor which is no mask for these lengths is refused.

Rules on fills:
- a masked position holds ``fill``: -inf, finfo(dtype).min or another negative number. -1e4 or -1e9 hide a key
  only while scores stay smaller than that, and every finite fill gives a fully masked row uniform weights
  instead of NaN: the caller has to keep the meaning, so ``fill`` is reported and never replaced;
- a sum of masks is one mask only when all fills are -inf. Two finite fills add up where both mask (finfo.min
  twice overflows to -inf), which no single fill says: such a sum is kept as one bias tensor, as is -inf plus
  finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from regraft.ir.mask.atoms import HEAD, KEY, QUERY, Describer, Unknown
from regraft.ir.mask.expression import (
    TRUE,
    ZERO,
    Apply,
    Const,
    Expression,
    Index,
    Load,
    build_sum,
    choices,
    linear,
)
from regraft.ir.mask.interpret import Interpreter, fake, size_expression
from regraft.ir.mask.length import ZERO_LENGTH, Length
from regraft.ir.mask.logic import and_, boolean, not_
from regraft.ir.mask.predicate import (
    EVERYTHING,
    Not,
    Predicate,
    renumber,
    tensors_of,
)
from regraft.ir.mask.simplify import simplify

Extent = int | torch.SymInt


@dataclass(frozen=True)
class Alibi:
    """``scale * slopes[head] * position``: Press et al., arXiv:2108.12409.

    ``position``: "relative" is key - query + offset, "key" is key + offset, "distance" is |key - query +
    offset|. ``slopes`` has one entry a head, whatever its shape.
    """

    slopes: Node
    scale: float
    position: Literal["relative", "key", "distance"]
    offset: Length = ZERO_LENGTH


@dataclass(frozen=True)
class TensorBias:
    """An additive tensor which broadcasts to [batch, heads, query length, key length]."""

    node: Node


Bias = Alibi | TensorBias


@dataclass(frozen=True)
class MaskForm:
    """The meaning of a mask tensor.

    ``fill`` None: a boolean mask (true = visible), or an additive tensor which masks nothing. Otherwise an
    additive mask; with ``combine`` "add" it is ``bias + where(predicate, 0, fill)``, with "replace" it is
    ``where(predicate, bias, fill)``: the two differ only where a finite fill meets a bias. ``dtype`` is the
    source's.
    """

    predicate: Predicate
    tensors: tuple[Node, ...]
    fill: float | None
    bias: Bias | None
    dtype: torch.dtype
    combine: Literal["add", "replace"] = "add"


@dataclass(frozen=True)
class Refusal:
    """Why a node is no mask for these lengths."""

    reason: str


def recognize_mask(
    node: Node,
    query_length: Extent,
    key_length: Extent,
    interpreter: Interpreter | None = None,
    reader: Node | None = None,
) -> MaskForm | Refusal:
    """The form of a boolean (true = visible) or additive float mask, a tensor broadcastable to [B, H, L, S].

    Share one ``interpreter`` for all masks of a graph: it remembers common parts. ``reader`` is the node
    which uses the mask; it matters only where the mask is written in place between its definition and its
    use.
    """
    value = fake(node)
    if value is None:
        return Refusal(f"{node.name} has no fake tensor value")
    describer = Describer(interpreter or Interpreter(node.graph), query_length, key_length)
    if not describer.fits(node):
        shape = tuple(str(extent) for extent in value.shape)
        return Refusal(f"{node.name} of shape {shape} does not broadcast to queries {query_length}, keys {key_length}")
    if value.dtype != torch.bool and not value.dtype.is_floating_point:
        return Refusal(f"{node.name} has dtype {value.dtype}: neither a boolean nor an additive float mask")
    expression = describer.expression(node, reader)
    if value.dtype == torch.bool:
        return _form(describer, node, expression, None, None)
    return _additive(describer, node, expression)


def recognize_condition(
    condition: Node,
    fill: float,
    query_length: Extent,
    key_length: Extent,
    dtype: torch.dtype,
    masked_where_true: bool = False,
    interpreter: Interpreter | None = None,
) -> MaskForm | Refusal:
    """The form of ``where(condition, scores, fill)``, or of ``masked_fill(scores, condition, fill)`` with
    ``masked_where_true``; ``dtype`` is that of the scores. The caller's scores are replaced, not added to. A condition
    that is no boolean must be proved to hold 0 and 1 only."""
    value = fake(condition)
    if value is None:
        return Refusal(f"{condition.name}, which is no tensor")
    describer = Describer(interpreter or Interpreter(condition.graph), query_length, key_length)
    if not describer.fits(condition):
        shape = tuple(str(extent) for extent in value.shape)
        return Refusal(
            f"{condition.name} of shape {shape} does not broadcast to queries {query_length}, keys {key_length}"
        )
    expression = describer.expression(condition)
    if value.dtype != torch.bool:
        values = choices(expression)
        if values is None or not set(values) <= {0, 1}:
            return Refusal(f"{condition.name}, which may hold other numbers than 0 and 1")
        expression = boolean(expression)
    try:  # the condition itself is a node, so that it can be kept as Dense whatever it is
        predicate = describer.predicate(expression)
    except Unknown:
        return Refusal(f"no tensor of the graph holds the condition {condition.name}")
    predicate = Not(predicate) if masked_where_true else predicate
    return _finish(describer, predicate, fill, None, dtype, "replace")


def _form(
    describer: Describer, node: Node, visible: Expression, fill: float | None, bias: Bias | None,
    combine: Literal["add", "replace"] = "add",
) -> MaskForm | Refusal:  # fmt: skip
    value = fake(node)
    assert value is not None
    try:
        predicate = describer.predicate(visible)
    except Unknown:
        if value.dtype.is_floating_point:
            return _tensor_form(node, value.dtype)
        return Refusal(f"no tensor of the graph holds {node.name}")
    return _finish(describer, predicate, fill, bias, value.dtype, combine)


def _finish(
    describer: Describer, predicate: Predicate, fill: float | None, bias: Bias | None, dtype: torch.dtype,
    combine: Literal["add", "replace"],
) -> MaskForm:  # fmt: skip
    try:
        rows, columns = describer.length(describer.rows), describer.length(describer.columns)
    except Unknown:
        rows = columns = None  # type: ignore[assignment]
    plain = simplify(predicate, rows, columns)
    used = sorted(tensors_of(plain))
    tensors = tuple(describer.tensors[place] for place in used)
    plain = renumber(plain, {old: new for new, old in enumerate(used)})
    return MaskForm(plain, tensors, fill, bias, dtype, combine)


def _tensor_form(node: Node, dtype: torch.dtype) -> MaskForm:
    return MaskForm(EVERYTHING, (), None, TensorBias(node), dtype)


def _additive(describer: Describer, node: Node, expression: Expression) -> MaskForm | Refusal:
    value = fake(node)
    assert value is not None
    whole = _tensor_form(node, value.dtype)
    if expression is ZERO:
        return MaskForm(EVERYTHING, (), None, None, value.dtype)
    match expression:
        case Apply(operator="where", arguments=(condition, kept, Const(value=fill))) if _hides(fill):
            if not isinstance(kept, Const):
                return _replaced(describer, node, condition, kept, float(fill))
            if kept is ZERO:
                return _form(describer, node, condition, float(fill), None)
        case Apply(operator="where", arguments=(condition, Const(value=fill), kept)) if _hides(fill):
            if not isinstance(kept, Const):
                return _replaced(describer, node, not_(condition), kept, float(fill))
            if kept is ZERO:
                return _form(describer, node, not_(condition), float(fill), None)
    visible, fills, rest = _masks(expression)
    bias = None if rest is ZERO else _bias(describer, rest)
    if (rest is not ZERO and bias is None) or (len(fills) > 1 and any(fill != -math.inf for fill in fills)):
        return whole
    return _form(describer, node, visible, fills[0] if fills else None, bias)


def _replaced(
    describer: Describer, node: Node, visible: Expression, kept: Expression, fill: float
) -> MaskForm | Refusal:
    bias = _bias(describer, kept)
    value = fake(node)
    assert value is not None
    if bias is None:
        return _tensor_form(node, value.dtype)
    return _form(describer, node, visible, fill, bias, "replace")


def _hides(fill: float) -> bool:
    return fill < 0


def _masks(expression: Expression) -> tuple[Expression, list[float], Expression]:
    """Split a sum into its masks (their conjunction and fills) and the rest."""
    if isinstance(expression, Apply) and expression.operator == "add":
        # An inexact sum; masks with infinite fills stay apart in it.
        left, right = (_masks(argument) for argument in expression.arguments)
        if left[2] is ZERO or right[2] is ZERO:
            return and_(left[0], right[0]), left[1] + right[1], right[2] if left[2] is ZERO else left[2]
        return TRUE, [], expression
    constant, terms = linear(expression)
    visible: Expression = TRUE
    fills: list[float] = []
    rest: dict[Expression, int | float] = {}
    for term, factor in terms.items():
        match term:
            case Apply(operator="where", arguments=(condition, Const(value=0), Const(value=fill))) if (
                factor == 1 and _hides(fill)
            ):
                visible, fills = and_(visible, condition), [*fills, float(fill)]
            case Apply(operator="where", arguments=(condition, Const(value=fill), Const(value=0))) if (
                factor == 1 and _hides(fill)
            ):
                visible, fills = and_(visible, not_(condition)), [*fills, float(fill)]
            case _:
                rest[term] = factor
    return visible, fills, build_sum(constant, rest)


def _bias(describer: Describer, expression: Expression) -> Bias | None:
    alibi = _alibi(describer, expression)
    if alibi is not None:
        return alibi
    try:
        return TensorBias(describer.tensor(expression))
    except Unknown:
        return None


def _alibi(describer: Describer, expression: Expression) -> Alibi | None:
    constant, terms = linear(expression)
    if constant != 0 or len(terms) != 1:
        return None
    ((product, scale),) = terms.items()
    if not (isinstance(product, Apply) and product.operator == "mul" and len(product.arguments) == 2):
        return None
    slopes, position = product.arguments
    if not isinstance(slopes, Load):
        slopes, position = position, slopes
    if not isinstance(slopes, Load) or not slopes.dtype.is_floating_point:
        return None
    value = fake(slopes.node)
    assert value is not None
    heads = [place for place in slopes.indices if place is not ZERO]
    whole = all(place is not ZERO or size_expression(size) is size_expression(1)
                for place, size in zip(slopes.indices, value.shape, strict=True))  # fmt: skip
    if not whole or not (len(heads) == 1 and isinstance(heads[0], Index) and heads[0].dim == HEAD):
        return None
    distance = isinstance(position, Apply) and position.operator == "abs"
    start, places = linear(position.operands[0] if distance else position)
    factors = {term.dim: factor for term, factor in places.items() if isinstance(term, Index)}
    sizes = {term: factor for term, factor in places.items() if not isinstance(term, Index)}
    try:
        offset = describer.length(build_sum(start, sizes))
    except Unknown:
        return None
    sign = factors.get(KEY, 0)
    if abs(sign) != 1 or factors.keys() - {KEY, QUERY}:
        return None
    if sign < 0:
        offset = -offset
        scale = scale if distance else -scale
    if factors.get(QUERY, 0) == -sign:
        return Alibi(slopes.node, float(scale), "distance" if distance else "relative", offset)
    if QUERY not in factors and not distance:
        return Alibi(slopes.node, float(scale), "key", offset)
    return None
