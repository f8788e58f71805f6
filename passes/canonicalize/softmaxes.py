"""A softmax that is written out: ``exp(x) / sum(exp(x))``, with or without the row maximum taken off, divided before or
behind a product with values; one over another dim than the last that is then permuted; and one with a column more,
whose weights are not read: behind the others is where it stands in canonical form."""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, is_call, is_tensor, rank, shape, size_equal, tensor_value
from regraft.ir.pattern import (
    add,
    anything,
    cat,
    div,
    either,
    exp,
    matmul,
    maybe,
    mul,
    operator,
    scalar,
    sigmoid,
    slice_,
    softmax,
    sub,
    to_dtype,
    unsqueeze,
    variable,
    where,
)
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten
total = operator(aten.sum.dim_IntList)
amax = operator(aten.amax.default)
row_maximum = operator(aten.max.dim)
first_of = operator(python_operator.getitem)
pad = operator(aten.pad.default)
logsumexp = operator(aten.logsumexp.default)
equal = operator(aten.eq.Scalar)
negated = operator(aten.logical_not.default, aten.bitwise_not.default)
any_of = operator(aten.any.dim)
all_of = operator(aten.all.dim)
where_self = operator(aten.where.ScalarSelf)
_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)


class SoftmaxWrittenOut(Rule):
    """exp(x - max(x)) / sum(exp(x - max(x))) is softmax(x)."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any) -> Any:
        maximum = either(
            amax(x, anything("over"), True),
            first_of(row_maximum(x, scalar("axis"), True), 0),
        )
        raised = either(exp(sub(x, maximum)).named("raised"), exp(x).named("raised"))
        return div(raised, total(raised, anything("summed"), True))

    def check(self, match: Match) -> Iterator[Requirement]:
        summed = list(match.summed or ())
        yield need(len(summed) == 1, "sums over several dims")
        for dims in (match.get("over"), match.get("axis")):
            dims = [dims] if isinstance(dims, int) else dims
            yield need(dims is None or list(dims) == summed, "the maximum is of another dim than the sum")

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.softmax.int, match.x, match.summed[0])


class SoftmaxDividedLast(Rule):
    """(exp(x) @ v) / sum(exp(x)) is softmax(x) @ v, with or without the row maximum taken off."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, value: Any) -> Any:
        maximum = either(amax(x, [-1], True), first_of(row_maximum(x, -1, True), 0))
        raised = either(exp(sub(x, maximum)).named("raised"), exp(x).named("raised"))
        return div(matmul(raised, value).named("product"), total(raised, [-1], True))

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.sole_user("product"), "the product is used undivided too")
        yield need(rank(match.raised) >= 2 and rank(match.value) >= 2, "an operand has one dim")

    def replace(self, match: Match, build: Builder) -> Replacement:
        weights = build.call(aten.softmax.int, match.x, -1)
        return build.call(aten.matmul.default, weights, match.value)


class SafeSoftmax(Rule):
    """softmax(x), and zero where every x of a row is minus infinity, is what PyTorch calls a safe softmax: as core ATen
    has the weights of scaled_dot_product_attention."""

    exactness = Exactness.BITWISE
    quiet = True

    def pattern(self, x: Any, zero: Any) -> Any:
        hidden = equal(x, -math.inf)
        empty = either(
            negated(any_of(negated(hidden), scalar("axis"), True)),
            all_of(hidden, scalar("axis"), True),
        )
        weights = softmax(x, scalar("axis"), anything("softmax_dtype"))
        return either(where(empty, variable("zero"), weights), where_self(empty, 0, weights))

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need("zero" not in match or _is_zero(match.zero), "rows of minus infinity alone are not zero")
        yield need(dtype(match.root) == dtype(match.x), "the weights are of another type")

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten._safe_softmax.default, match.x, match.axis)


def _is_zero(node: fx.Node) -> bool:
    filled = is_call(node, (aten.full_like.default, aten.full.default, aten.new_full.default))
    return arguments(node)["fill_value"] == 0 if filled else is_call(node, _ZEROS)


@identity(aten.exp.default, exactness=Exactness.REASSOCIATED)
def exp_of_log_softmax(node: fx.Node, build: Builder) -> fx.Node | None:
    """exp(log_softmax(x)) is softmax(x)."""
    source: Any = node.args[0]
    return build.call(aten.softmax.int, *source.args) if is_call(source, (aten.log_softmax.int,)) else None


@identity(aten.permute.default, exactness=Exactness.REASSOCIATED)
def permuted_softmax(node: fx.Node, build: Builder) -> fx.Node | None:
    """permute(softmax(x, dim)) is a softmax over the last dim of permute(x), where that dim comes last."""
    source: Any = node.args[0]
    order: Any = node.args[1]
    if not is_call(source, (aten.softmax.int,)) or len(source.users) > 1:
        return None
    given = arguments(source)
    dim = given["dim"] + rank(source) if given["dim"] < 0 else given["dim"]
    if list(order)[-1] != dim or dim == rank(source) - 1:
        return None
    extra = [given["dtype"]] if given["dtype"] is not None else []
    return build.call(aten.softmax.int, build.call(aten.permute.default, given["self"], order), -1, *extra)


class SoftmaxWithSink(Rule):
    """exp(x - m) / (sum(exp(x - m)) + exp(c - m)) is softmax of x and a column c, without that column; c is 0 where 1
    or exp(-m) is added. Any m that a row has in common may be taken off."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any) -> Any:
        raised = exp(either(sub(x, variable("shift")), x)).named("raised")
        extra = either(exp(variable("below")), scalar("number"))
        return div(raised, add(total(raised, [-1], True), extra))

    def check(self, match: Match) -> Iterator[Requirement]:
        shift, below = match.get("shift"), match.get("below")
        yield need(shift is None or shape(shift)[-1:] == (1,), "what is taken off differs within a row")
        if below is None:
            yield need(shift is None and match.number == 1, "the number added is not exp of a logit")
            return
        column = _logit(below, shift)
        yield need(column is not None, "the sum and the logit are shifted differently")
        yield need(not isinstance(column, fx.Node) or shape(column)[-1:] == (1,), "the logit differs within a row")
        match.facts["column"] = column

    def replace(self, match: Match, build: Builder) -> Replacement:
        x, column = match.x, match.facts.get("column")
        if isinstance(column, fx.Node):
            behind = build.call(aten.expand.default, column, [*build.sizes(x)[:-1], 1])
        else:
            behind = _constant(build, x, 0.0)
        weights = build.call(aten.softmax.int, build.call(aten.cat.default, [x, behind], -1), -1)
        return build.call(aten.slice.Tensor, weights, -1, 0, build.size(x, -1))


class SinkScalesOutput(Rule):
    """(softmax(x) @ v) * sigmoid(logsumexp(x) - c) is (softmax of x and a column c, without that column) @ v."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, value: Any, logit: Any) -> Any:
        bare = softmax(x, -1, anything("softmax_dtype"))
        weights = either(to_dtype(bare, anything("cast")), bare)
        above = sub(logsumexp(x, [-1], anything("keeps")), logit)
        opened = sigmoid(maybe(lambda y: to_dtype(y, anything()), above))
        share = maybe(lambda y: to_dtype(y, anything()), maybe(lambda y: unsqueeze(y, -1), opened, "lifted"))
        return mul(matmul(weights, value).named("product"), share)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need((match.lifted == "wrapped") != bool(match.keeps), "the share is not one number a row")
        yield need(match.sole_user("product"), "the product is used unscaled too")
        sizes = shape(match.logit) if match.keeps else (*shape(match.logit), 1)
        yield need(sizes[-1:] == (1,) and len(sizes) <= rank(match.x), "the logit differs within a row")
        yield need(dtype(match.root) == dtype(match.product), "the share has another type")

    def replace(self, match: Match, build: Builder) -> Replacement:
        column = match.logit if match.keeps else build.call(aten.unsqueeze.default, match.logit, -1)
        if dtype(column) != dtype(match.x):
            column = build.call(aten.to.dtype, column, dtype(match.x))
        behind = build.call(aten.expand.default, column, [*build.sizes(match.x)[:-1], 1])
        joined = build.call(aten.cat.default, [match.x, behind], -1)
        weights = build.call(aten.softmax.int, joined, -1, match.softmax_dtype)
        if "cast" in match:
            weights = build.call(aten.to.dtype, weights, match.cast)
        kept = build.call(aten.slice.Tensor, weights, -1, 0, build.size(match.x, -1))
        return build.call(aten.matmul.default, kept, match.value)


def _logit(below: fx.Node, shift: Any) -> fx.Node | int | None:
    """The logit that ``below`` is less ``shift``: 0 where it is ``-shift``, None where something else is taken off."""
    if shift is None:
        return below
    if is_call(below, (aten.neg.default,)) and below.args[0] is shift:
        return 0
    if is_call(below, (aten.sub.Tensor,)) and below.args[1] is shift and is_tensor(below.args[0]):
        return below.args[0]  # type: ignore[return-value]
    return None


def _constant(build: Builder, x: fx.Node, value: float) -> fx.Node:
    """A column of one number beside ``x``, which is not read: its scores may be needed nowhere else."""
    like = tensor_value(x)
    sizes = [*build.sizes(x)[:-1], 1]
    return build.call(aten.full.default, sizes, value, dtype=like.dtype, device=like.device)


@identity(aten.pad.default)
def column_of_one_number(node: fx.Node, build: Builder) -> fx.Node | None:
    """A softmax's operand that is padded by a column behind is concatenated with that column."""
    given = arguments(node)
    if list(given["pad"]) != [0, 1] or given["mode"] != "constant" or not any(map(_is_softmax, node.users)):
        return None
    column = _constant(build, given["self"], given["value"] or 0.0)
    return build.call(aten.cat.default, [given["self"], column], -1)


def _is_softmax(user: fx.Node) -> bool:
    """Whether a softmax over the last dim, or what takes the maximum off for one."""
    if is_call(user, (aten.sub.Tensor,)):
        return any(_is_softmax(reader) for reader in user.users)
    return is_call(user, (aten.softmax.int,)) and arguments(user)["dim"] in (-1, rank(user) - 1)


class ColumnBehind(Rule):
    """Weights of a column in front of the others that are not read: the column may stand behind them."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, column: Any, x: Any) -> Any:
        joined = cat([column, x], -1).named("joined")
        padded = pad(x, [1, 0], "constant", anything("value")).named("joined")
        both = either(joined, padded)
        shifted = sub(both, either(amax(both, [-1], True), first_of(row_maximum(both, -1, True), 0)))
        weights = softmax(either(shifted, both), -1, anything("softmax_dtype")).named("weights")
        return slice_(either(to_dtype(weights, anything("cast")), weights), -1, 1, anything("end"))

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need("column" not in match or shape(match.column)[-1] == 1, "more than a column stands in front")
        yield need(size_equal(shape(match.root)[-1], shape(match.x)[-1]), "other columns are dropped too")
        yield need(all(match.sole_user(name) for name in ("weights", "joined")), "the column's weight is read")

    def replace(self, match: Match, build: Builder) -> Replacement:
        x, column = match.x, match.get("column")
        if column is None:
            column = _constant(build, x, match.get("value") or 0.0)
        weights = build.call(aten.softmax.int, build.call(aten.cat.default, [x, column], -1), -1, match.softmax_dtype)
        if "cast" in match:
            weights = build.call(aten.to.dtype, weights, match.cast)
        return build.call(aten.slice.Tensor, weights, -1, 0, build.size(x, -1))


SPELLINGS = (
    SoftmaxWrittenOut(),
    SafeSoftmax(),
    SoftmaxDividedLast(),
    exp_of_log_softmax,
    permuted_softmax,
    SoftmaxWithSink(),
    SinkScalesOutput(),
    column_of_one_number,
    ColumnBehind(),
)
