"""Recognise reversed attention: values go along transposed weights, ``softmax(q k^T)^T v`` (arXiv:2304.03282).

The weights never meet: one pass finds each query's log-sum-exp, another attends with query and key exchanged, weights
``exp(s - lse)`` and no normaliser. That is how flash attention computes the gradient of its values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.mask import Everything
from regraft.ir.nodes import Builder, shape, sizes_equal
from regraft.ir.pattern import anything, chain, div, either, matmul, mul, permute, scalar, softmax, tanh, to_dtype
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize.heads import build_operands, read_heads, shaped_as
from regraft.passes.recognize.masks import Masks
from regraft.passes.recognize.scores import Refused, read_scores

aten = torch.ops.aten


def _softcapped(scores: Any) -> Any:
    inside = either(div(scores, scalar("cap")), mul(scores, scalar("inverse")))
    return mul(tanh(inside), scalar("outer"))


def _four(function: Any, heads: int = 4) -> Any:
    def make() -> Any:
        generator = torch.Generator().manual_seed(0)
        return function, tuple(torch.randn(2, heads, 5, 8, generator=generator) for _ in range(3))

    return make


def _with_its_weights(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    weights = (query @ key.mT).softmax(-1)
    return weights.mT @ value, weights


class RecognizeReversedAttention(Rule):
    """softmax(scale * (q @ k.T)).T @ v, without a mask."""

    recognizes = "attention_mapped"
    landmark = "weights"
    examples = (
        Example("reversed", _four(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1).mT @ v)),
        Example("with a softcap", _four(lambda q, k, v: (20 * (q @ k.mT / 20).tanh()).softmax(-1).mT @ v)),
    )
    near_misses = (
        Example("the weights are returned", _four(_with_its_weights), "weights are used outside the attention"),
        Example(
            "over the heads, and transposed",
            _four(lambda q, k, v: (q @ k.mT).softmax(1).mT @ v),
            "softmax runs over dim -3, not over the keys",
        ),
    )

    def pattern(self, query: Any, key_transposed: Any, value: Any) -> Any:
        scores = chain(
            matmul(query, key_transposed).named("product"),
            "before",
            scale=lambda s: mul(s, scalar("factor")),
            divide=lambda s: div(s, scalar("divisor")),
            softcap=_softcapped,
            cast=lambda s: to_dtype(s, anything()),
        )
        weights = softmax(scores, scalar("axis"), anything("softmax_dtype")).named("weights")
        weights = chain(weights, "after", cast=lambda w: to_dtype(w, anything()))
        return matmul(permute(weights, anything("order")).named("turned"), value)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.axis == -1, f"softmax runs over dim {match.axis}, not over the keys", at=match.weights)
        order = list(match["order"])
        swapped = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
        yield need(order == swapped, "the weights are not transposed", at=match.turned)
        inside = set(match.nodes)
        outside = [n for n in match.nodes[1:] if any(user not in inside for user in n.users)]
        yield need(not outside, "attention weights are used outside the attention", at=outside[0] if outside else None)
        heads = [shape(node)[-3:-2] for node in (match.query, match.key_transposed)]
        yield need(sizes_equal(*heads), "query and key have different heads", at=match.product)
        try:
            scores = read_scores(match.product, match.steps("before"))
            match.facts["site"] = (
                read_heads(match.query, match.key_transposed, match.value, match.product, scores, match.root),
                scores,
            )
        except Refused as refused:
            yield need(False, refused.reason, at=refused.node)

    def replace(self, match: Match, build: Builder) -> Replacement:
        heads, scores = match.facts["site"]
        given = build_operands(build, heads, scores, Masks(predicate=Everything()))
        query, key, value = given.tensors[:3]
        lse = build.call(ops.attention_lse, query, key, [], scale=given.scale, softcap=scores.softcap)
        shift = build.call(aten.unsqueeze.default, build.call(aten.neg.default, lse), 2)
        node = build.call(
            ops.attention_mapped, key, query, value, [], shift, None,
            scale=given.scale, weight="exp", softcap=scores.softcap,
        )  # fmt: skip
        return shaped_as(build, node, match.root)
