"""Recognise attention written out: ``softmax(scale * q @ k.T, masked) @ v`` becomes one attention operator."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from regraft.ir.matcher import TakenStep
from regraft.ir.nodes import Builder, is_call, is_tensor, is_view, shape, size_equal, sizes_equal
from regraft.ir.pattern import (
    Operator,
    add,
    anything,
    cat,
    chain,
    div,
    either,
    matmul,
    mul,
    reshape,
    scalar,
    slice_,
    sub,
    tanh,
    to_dtype,
    variable,
    where,
)
from regraft.ir.pointwise import is_pointwise
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import attention_examples as shown
from regraft.passes.recognize.heads import Heads, build_attention, read_heads
from regraft.passes.recognize.masks import Masks, read_masks
from regraft.passes.recognize.scores import Refused, Scores, read_scores
from regraft.passes.recognize.zeroing import ZEROING, hide_again, zero_rows, zeroes_rows

aten = torch.ops.aten
#: A safe one gives zero where every score of a row is minus infinity.
SOFTMAXES = (aten.softmax.int, aten._safe_softmax.default)
softmax = Operator(SOFTMAXES)
where_other = Operator((aten.where.ScalarOther,))
where_self = Operator((aten.where.ScalarSelf,))
row_maximum = Operator((aten.max.dim,))
first_of = Operator((python_operator.getitem,))
amax = Operator((aten.amax.default,))
from_number = Operator((aten.rsub.Scalar,))
at_least = Operator((aten.clamp.default,))
without_nan = Operator((aten.nan_to_num.default,))


def _softcapped(scores: Any) -> Any:
    inside = either(div(scores, scalar("cap")), mul(scores, scalar("inverse")))
    return mul(tanh(inside), scalar("outer"))


def _minus_maximum(scores: Any) -> Any:
    return sub(scores, either(first_of(row_maximum(scores, -1, True), 0), amax(scores, [-1], True)))


def _blended(scores: Any) -> Any:
    kept = mul(scores, variable("keep"))
    rest = mul(from_number(variable("keep"), 1), scalar("fill"))
    return either(add(kept, rest).named("plus"), sub(kept, rest))


class RecognizeAttention(Rule):
    """softmax(scale * (q @ k.T) + mask) @ v, with scale, mask, softcap and sinks in any of their spellings."""

    recognizes = "attention"
    landmark = "weights"
    examples = shown.ATTENTION
    near_misses = shown.ATTENTION_NEAR_MISSES

    def pattern(self, query: Any, key_transposed: Any, value: Any) -> Any:
        scores = chain(
            matmul(query, key_transposed).named("product"),
            "before",
            scale=lambda s: mul(s, scalar("factor")),
            divide=lambda s: div(s, scalar("divisor")),
            softcap=_softcapped,
            blend=_blended,
            scale_tensor=lambda s: mul(s, variable("factor")),
            divide_tensor=lambda s: div(s, variable("divisor")),
            add=lambda s: add(s, variable("addend")),
            where_other=lambda s: where_other(variable("condition"), s, scalar("fill")),
            where_self=lambda s: where_self(variable("condition"), scalar("fill"), s),
            where_tensor=lambda s: where(variable("condition"), s, variable("fill")),
            at_least=lambda s: at_least(s, scalar("least")),
            minus_maximum=_minus_maximum,
            subtract=lambda s: sub(s, variable("subtrahend")),
            sinks=lambda s: cat([s, variable("column")], -1),
            cast=lambda s: to_dtype(s, anything()),
            reshape=lambda s: reshape(s, anything()),
        )
        weights = chain(
            softmax(scores, scalar("axis"), anything("softmax_dtype")).named("weights"),
            "after",
            cast=lambda w: to_dtype(w, anything()),
            drop_sinks=lambda w: slice_(w, -1, anything("start"), anything("kept")),
            zero_self=lambda w: where_self(variable("condition"), 0, w),
            zero_other=lambda w: where_other(variable("condition"), w, 0),
            no_nan=lambda w: without_nan(w, either(None, 0)),
            reshape=lambda w: reshape(w, anything()),
        )
        return matmul(weights, value)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.axis == -1, f"softmax runs over dim {match.axis}, not over the keys", at=match.weights)
        scores = _scores_of(match)
        outside = _read_outside(match, scores)
        what = "scores" if outside in scores else "weights"
        yield need(outside is None, f"attention {what} are used outside the attention", at=outside)
        try:
            match.facts["site"] = _read(match)
        except Refused as refused:
            yield need(False, refused.reason, at=refused.node)

    def replace(self, match: Match, build: Builder) -> Replacement:
        heads, scores, masks = match.facts["site"]
        zeroed = is_call(match.weights, (aten._safe_softmax.default,)) or zeroing_steps(match)
        empty_rows = "zero" if zeroed else "nan"
        result = build_attention(build, match.root, heads, scores, masks, empty_rows=empty_rows)
        return zero_rows(build, result, match.value, row_zeroing_steps(match))


def _read(match: Match) -> tuple[Heads, Scores, Masks]:
    scores = read_scores(match.product, match.steps("before"))
    hide_again(scores, zeroing_steps(match), match.program)
    if not size_equal(shape(match.weights)[-1], shape(match.product)[-1] + int(scores.sinks is not None)):
        raise Refused("the softmax does not run over all keys", match.weights)
    _check_sinks(match, scores)
    heads = read_heads(match.query, match.key_transposed, match.value, match.product, scores, match.root)
    if heads.leading.into_batch and isinstance(scores.sinks, fx.Node):
        raise Refused("sinks of heads that become the batch", match.weights)
    key_length = shape(match.product)[-1]
    masks = read_masks(match.program, scores, shape(match.product)[-2], key_length)
    if zeroing_steps(match) and (masks.fill is not None or masks.chain):
        raise Refused("weights are set to zero, of a mask that leaves them something", match.weights)
    return heads, scores, masks


def zeroing_steps(match: Match) -> list[TakenStep]:
    """The steps behind the softmax that give rows without a key no weight at all."""
    rows = row_zeroing_steps(match)
    return [step for step in match.steps("after") if step.label in ZEROING and step not in rows]


def row_zeroing_steps(match: Match) -> list[TakenStep]:
    """The steps behind the softmax that zero whole rows: their outputs can as well be zeroed."""
    return [step for step in match.steps("after") if zeroes_rows(step, match.root)]


def _check_sinks(match: Match, scores: Scores) -> None:
    dropped = [step for step in match.steps("after") if step.label == "drop_sinks"]
    keys = shape(match.product)[-1]
    if bool(dropped) != (scores.sinks is not None) or any(
        step["start"] or not size_equal(shape(step.node)[-1], keys) for step in dropped
    ):
        raise Refused("columns of the attention weights are dropped or added", match.weights)


def _scores_of(match: Match) -> set[fx.Node]:
    """The product and what is made of it in front of the softmax."""
    return {match.product, *(step.node for step in match.steps("before"))}


def _read_outside(match: Match, scores: set[fx.Node]) -> fx.Node | None:
    """An interior node whose value is read outside the match: scores and weights would be computed twice.

    Weights of several values (differential attention) are read by the product with each, and scores under several masks
    (a window and chosen blocks) by a softmax each: every one is an attention of its own, as the source has it before
    equal scores and weights are merged.
    """
    inside = set(match.nodes)
    weights = match.root.args[0]
    for node in match.nodes[1:]:
        others = [user for user in node.users if user not in inside and (user.users or user.op == "output")]
        shared = _is_for_softmaxes if node in scores else partial(_is_sibling, weights=weights, match=match)
        if not all(map(shared, others)):
            return node
    return None


def _is_for_softmaxes(node: fx.Node) -> bool:
    """Whether all that is made of ``node`` by maps and views goes into softmaxes."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if is_call(node, SOFTMAXES):
            continue
        if not (node.users and (is_pointwise(node) or is_view(node))):
            return False
        pending += [user for user in node.users if user not in seen]
        seen.update(node.users)
    return True


def _is_sibling(user: fx.Node, weights: Any, match: Match) -> bool:
    """Whether ``user`` is the product of the same weights with another value of the same shape."""
    if not is_call(user, (aten.matmul.default,)) or user.args[0] is not weights:
        return False
    value = user.args[1]
    return is_tensor(value) and value is not weights and sizes_equal(shape(value), shape(match.value))  # type: ignore[arg-type]
