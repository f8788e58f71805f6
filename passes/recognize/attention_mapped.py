"""Recognise attention without a softmax: ``phi(scale * q @ k.T) * mask @ v``, normalised or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.matcher import TakenStep
from regraft.ir.nodes import Builder, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.pattern import (
    Operator,
    add,
    anything,
    chain,
    div,
    either,
    gelu,
    matmul,
    mul,
    relu,
    reshape,
    scalar,
    sigmoid,
    sub,
    tanh,
    to_dtype,
    variable,
    where,
)
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import attention_mapped_examples as shown
from regraft.passes.recognize.heads import Heads, build_operands, read_heads, shaped_as
from regraft.passes.recognize.masks import Masks, read_masks
from regraft.passes.recognize.scores import Condition, Refused, Scores, read_scores

aten = torch.ops.aten
elu = Operator((aten.elu.default,))
where_other = Operator((aten.where.ScalarOther,))
where_self = Operator((aten.where.ScalarSelf,))

#: Maps that give nothing for a score of minus infinity, so that a mask may as well come before them.
_HIDE_LOW_SCORES = ("sigmoid", "relu", "elu1")


def _softcapped(scores: Any) -> Any:
    inside = either(div(scores, scalar("cap")), mul(scores, scalar("inverse")))
    return mul(tanh(inside), scalar("outer"))


class RecognizeMappedAttention(Rule):
    """phi(scale * (q @ k.T) + mask) @ v for phi in sigmoid, relu, elu + 1, gelu, or of masked scores as they are."""

    recognizes = "attention_mapped"
    landmark = "weights"
    examples = shown.EXAMPLES
    near_misses = shown.NEAR_MISSES

    def pattern(self, query: Any, key_transposed: Any, value: Any) -> Any:
        scores = chain(
            matmul(query, key_transposed).named("product"),
            "before",
            scale=lambda s: mul(s, scalar("factor")),
            divide=lambda s: div(s, scalar("divisor")),
            softcap=_softcapped,
            add=lambda s: add(s, variable("addend")),
            raised=lambda s: add(s, scalar("shift")),
            lowered=lambda s: sub(s, scalar("shift")),
            subtract=lambda s: sub(s, variable("subtrahend")),
            where_other=lambda s: where_other(variable("condition"), s, scalar("fill")),
            where_self=lambda s: where_self(variable("condition"), scalar("fill"), s),
            where_tensor=lambda s: where(variable("condition"), s, variable("fill")),
            cast=lambda s: to_dtype(s, anything()),
        )
        mapped = either(
            sigmoid=sigmoid(scores).named("weights"),
            relu=relu(scores).named("weights"),
            elu1=add(elu(scores), scalar("one")).named("weights"),
            gelu=gelu(scores).named("weights"),
            identity=scores,
            tag="phi",
        )
        weights = chain(
            mapped,
            "after",
            keep=lambda w: mul(w, variable("keep")),
            where_other=lambda w: where_other(variable("condition"), w, scalar("fill")),
            where_self=lambda w: where_self(variable("condition"), scalar("fill"), w),
            normalise=lambda w: div(w, variable("divisor")),
            constant=lambda w: div(w, scalar("constant")),
            cast=lambda w: to_dtype(w, anything()),
            reshape=lambda w: reshape(w, anything()),
        )
        return matmul(weights, value)

    def check(self, match: Match) -> Iterator[Requirement]:
        parameters = match.program.is_made_of_weights(match.key_transposed)
        yield need(not parameters, "keys are parameters: a feed-forward layer, no attention", at=match.product)
        if match.phi == "elu1":
            yield need(match.one == 1, f"{match.one} is added to the elu, not 1", at=match.weights)
        try:
            match.facts["site"] = site = _read(match)
        except Refused as refused:
            yield need(False, refused.reason, at=refused.node)
            return
        masked = any(step.label in ("keep", "where_other", "where_self") for step in match.steps("after"))
        found = match.phi != "identity" or masked or site.normaliser == "sum_abs"
        yield need(found, "products without a mask, a map or a norm are no attention")
        outside = _read_outside(match, site)
        yield need(outside is None, "attention weights are used outside the attention", at=outside)

    def replace(self, match: Match, build: Builder) -> Replacement:
        site = match.facts["site"]
        given = build_operands(build, site.heads, site.scores, site.masks)
        query, key, value, tensors, bias, slopes = given.tensors
        if site.shift:
            device = query.meta["val"].device
            shift = build.call(aten.full.default, [1, 1, 1, 1], site.shift, dtype=torch.float32, device=device)
            bias = shift if bias is None else build.call(aten.add.Tensor, bias, shift)
        node = build.call(
            ops.attention_mapped,
            query,
            key,
            value,
            tensors,
            bias,
            slopes,
            scale=given.scale,
            weight=match.phi,
            mask=given.mask,
            softcap=site.scores.softcap,
            normaliser=site.normaliser,
            constant=site.constant,
        )
        return shaped_as(build, node, match.root)


@dataclass(frozen=True)
class _Site:
    heads: Heads
    scores: Scores
    masks: Masks
    normaliser: str
    constant: float
    #: a number that is added to all scores
    shift: float
    #: nodes that compute the normaliser, which may read the weights
    divisors: tuple[fx.Node, ...]


def _read(match: Match) -> _Site:
    shift, before = _read_shift(match.steps("before"))
    scores = read_scores(match.product, before)
    for item in scores.maskings:
        hides = match.phi in _HIDE_LOW_SCORES and item.fill <= -1e30 if isinstance(item, Condition) else True
        if not hides:
            raise Refused(f"masked scores weigh something under {match.phi}", match.product)
    normaliser, constant = "none", 0.0
    divisors: tuple[fx.Node, ...] = ()
    for step in match.steps("after"):
        if step.label in ("cast", "reshape"):
            continue
        if divisors or (normaliser != "none" and step.label in ("normalise", "constant")):
            raise Refused(f"{step.label} after the weights are normalised", step.node)
        if step.label == "keep":
            scores.maskings.append(Condition(step["keep"], -math.inf, False, torch.float32))
        elif step.label in ("where_other", "where_self"):
            if step["fill"] != 0:
                raise Refused(f"masked weights are {step['fill']}, not 0", step.node)
            masked_where_true = step.label == "where_self"
            scores.maskings.append(Condition(step["condition"], -math.inf, masked_where_true, torch.float32))
        elif step.label == "normalise":
            normaliser, constant, divisors = _read_normaliser(step.node.args[0], step["divisor"])
        elif match.phi == "identity" and not scores.softcap:
            scores.scale /= step["constant"]
        else:
            normaliser, constant = "constant", float(step["constant"])
    heads = read_heads(match.query, match.key_transposed, match.value, match.product, scores, match.root)
    masks = read_masks(match.program, scores, shape(match.product)[-2], shape(match.product)[-1])
    if masks.chain or masks.fill is not None or masks.least > -math.inf:
        raise Refused("masked scores keep some weight", match.product)
    return _Site(heads, scores, masks, normaliser, constant, shift, divisors)


def _read_shift(steps: Sequence[TakenStep]) -> tuple[float, list[TakenStep]]:
    """The numbers that are added to the scores, and the other steps. Raises ``Refused`` for what a sum does not say."""
    shift, others = 0.0, []
    for step in steps:
        if step.label in ("raised", "lowered"):
            if not isinstance(step["shift"], (int, float)):
                raise Refused("the scores are shifted by a number that is known at run time only", step.node)
            shift += step["shift"] if step.label == "raised" else -step["shift"]
        elif shift and step.label in ("scale", "divide", "softcap"):
            raise Refused(f"{step.label} after the scores are shifted", step.node)
        else:
            others.append(step)
    return shift, others


def _read_normaliser(weights: Any, divisor: fx.Node) -> tuple[str, float, tuple[fx.Node, ...]]:
    """The name and the number of what divides the weights, and its nodes. Raises ``Refused``."""
    nodes = [divisor]
    name, number, inner = "sum", 0.0, divisor
    if is_call(divisor, (aten.add.Tensor,)) and isinstance(divisor.args[1], (int, float)):
        name, number, inner = "sum_eps", float(divisor.args[1]), divisor.args[0]  # type: ignore[assignment]
    elif is_call(divisor, (aten.clamp.default,)) and tuple(divisor.args[1:]) in ((1,), (1, None)):
        inner = divisor.args[0]  # type: ignore[assignment]
        if is_call(inner, (aten.abs.default,)):
            nodes.append(inner)
            name, inner = "sum_abs", inner.args[0]  # type: ignore[assignment]
    summed = is_call(inner, (aten.sum.dim_IntList,)) and inner.args[0] is weights
    if not summed or not _over_keys(inner) or divisor.kwargs:
        raise Refused("the weights are divided by something else than their sum over the keys", divisor)
    return name, number, (*nodes, inner)


def _over_keys(total: fx.Node) -> bool:
    dims: Any = total.args[1]
    keeps = len(total.args) > 2 and bool(total.args[2])
    last = rank(total.args[0]) - 1  # type: ignore[arg-type]
    return keeps and list(dims) in ([-1], [last]) and size_equal(shape(total)[-1], 1)


def _read_outside(match: Match, site: _Site) -> fx.Node | None:
    """An interior node whose value is read outside the match and the normaliser."""
    inside = {*match.nodes, *site.divisors}
    for node in match.nodes[1:]:
        if is_tensor(node) and any(user not in inside and (user.users or user.op == "output") for user in node.users):
            return node
    return None
