"""A softmax that is written out: ``exp(x) / sum(exp(x))``, with or without the row maximum taken off."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Iterator
from typing import Any

import torch

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.pattern import anything, div, either, exp, operator, scalar, sub
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need

aten = torch.ops.aten
total = operator(aten.sum.dim_IntList)
amax = operator(aten.amax.default)
row_maximum = operator(aten.max.dim)
first_of = operator(python_operator.getitem)


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


SPELLINGS = (SoftmaxWrittenOut(),)
