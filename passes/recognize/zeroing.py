"""Attention weights that are set to zero behind the softmax, where the scores were masked: what that makes of a row
without a key. A condition that says so of whole rows zeroes their outputs.

Where any key is left the masked ones have no weight anyhow. A row that sees none is the mean of the values, or NaN,
and then zeroed: it gives zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from regraft.ir.matcher import TakenStep
from regraft.ir.nodes import Builder, is_call, rank, shape, size_equal, sizes_equal
from regraft.ir.program import Program
from regraft.passes.recognize.hiding import may_hide
from regraft.passes.recognize.scores import Condition, Refused, Scores

aten = torch.ops.aten

#: Steps behind the softmax that write zero: where a condition says so, and over NaN.
_BY_CONDITION = ("zero_self", "zero_other")
ZEROING = (*_BY_CONDITION, "no_nan")
_NOTHING_LEFT = -1e30
_NEGATIONS = (aten.logical_not.default, aten.bitwise_not.default)


def hide_again(scores: Scores, steps: Sequence[TakenStep], program: Program) -> None:
    """Let the masks of ``scores`` hide for good, as zeros behind the softmax make them; raises ``Refused`` where a row
    may have no key for another reason than those zeros cover."""
    if not steps:
        return
    zeroed = [_hides(step["condition"], step.label == "zero_self") for step in steps if step.label != "no_nan"]
    conditions = [item for item in scores.maskings if isinstance(item, Condition)]
    hidden = [_hides(item.condition, item.masked_where_true) for item in conditions]
    if any(one not in hidden for one in zeroed):
        raise Refused("weights are set to zero where the scores are not masked", steps[-1].node)
    biases = [item.node for item in scores.additions if may_hide(item.node, program)]
    if zeroed:
        if biases or any(one not in zeroed for one in hidden):
            raise Refused("not all masks set weights to zero behind the softmax", steps[-1].node)
        if any(item.fill > _NOTHING_LEFT for item in conditions):
            raise Refused("masked scores keep some weight", steps[-1].node)
        scores.maskings = [
            replace(item, fill=-math.inf) if isinstance(item, Condition) else item for item in scores.maskings
        ]


def zeroes_rows(step: TakenStep, product: fx.Node) -> bool:
    """Whether a step zeroes all weights of a row or none, of the rows that ``product`` with the values has."""
    if (
        step.label not in _BY_CONDITION
        or rank(step["condition"]) < 2
        or not size_equal(shape(step["condition"])[-1], 1)
    ):
        return False
    return sizes_equal(shape(step.node)[:-1], shape(product)[:-1])


def zero_rows(build: Builder, outputs: fx.Node, value: fx.Node, steps: Sequence[TakenStep]) -> fx.Node:
    """``outputs`` of attention to ``value``, where no weights are left in rows that ``steps`` zero: they are zero, or
    NaN where a value is not finite."""
    nothing = build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, value, 0), [-2], True) if steps else None
    for step in steps:
        kept = (nothing, outputs) if step.label == "zero_self" else (outputs, nothing)
        outputs = build.call(aten.where.self, step["condition"], *kept)
    return outputs


def _hides(condition: fx.Node, where_true: bool) -> tuple[Any, bool]:
    """The condition and when it hides, without the negations on it."""
    node: Any = condition
    while is_call(node, _NEGATIONS):
        node, where_true = node.args[0], not where_true
    return node, where_true
