"""Recognise rotary position embedding by its turned copy: ``x * cos + turn(x) * sin``, and times a decay (xPos)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from regraft.ir import ops
from regraft.ir.nodes import Builder, is_call, rank, shape, size_equal, sizes_equal
from regraft.ir.pattern import (
    add,
    anything,
    cat,
    either,
    mul,
    neg,
    operator,
    reshape,
    scalar,
    slice_,
    sub,
    to_dtype,
    variable,
)
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import rope_examples as shown
from regraft.passes.recognize.pairs import deinterleaved, is_paired, rest_of
from regraft.passes.recognize.reading import again

aten = torch.ops.aten
stack = operator(aten.stack.default)
select = operator(aten.select.int)


def turned(x: Any) -> Any:
    """``x`` with each pair turned by a quarter: ``(a, b)`` becomes ``(-b, a)``, or ``(b, -a)`` in a layout "back"."""
    pairs = reshape(variable("base"), anything()).named("pairs")
    halves = (
        slice_(x, -1, scalar("second_start"), scalar("second_end")),
        slice_(x, -1, scalar("first_start"), scalar("first_end")),
    )
    steps = (
        slice_(x, -1, scalar("odd"), anything("odd_end"), 2),
        slice_(x, -1, scalar("even"), anything("even_end"), 2),
    )
    picks = (select(pairs, -1, scalar("odd")), select(pairs, -1, scalar("even")))

    def joined(parts: list[Any], layout: str) -> Any:
        if layout == "halves":
            return cat(parts, -1).named("turned")
        return reshape(stack(parts, -1).named("turned"), anything())

    alternatives = {}
    for layout, (second, first) in {"halves": halves, "steps": steps, "picks": picks}.items():
        alternatives[layout] = joined([neg(second), first], layout)
        alternatives[f"{layout} back"] = joined([second, neg(first)], layout)
    return either(**alternatives, tag="layout")


class RecognizeRope(Rule):
    """``x * cos + turn(x) * sin``, and the concatenation with what passes through where only a part turns."""

    recognizes = "rope"
    landmark = "turned"
    examples = shown.EXAMPLES
    near_misses = shown.NEAR_MISSES

    def pattern(self, x: Any, cos: Any, sin: Any, passed: Any) -> Any:
        raised = to_dtype(x, anything("wide")).named("raised")
        part = slice_(variable("whole"), -1, scalar("start"), scalar("end")).named("x")
        rotated = either(
            add(mul(x, cos), mul(turned(x), sin)),
            sub(mul(x, cos), mul(turned(x), sin)),
            add(mul(part, cos), mul(turned(variable("whole")), sin)),
            add(mul(raised, cos), mul(to_dtype(turned(x), anything("wide")), sin)),
            add(mul(mul(x, cos), variable("decay")), mul(mul(turned(x), sin), variable("decay"))),
        )
        return either(partial=cat([rotated.named("rotated"), passed], -1), whole=rotated.named("rotated"), tag="extent")

    def check(self, match: Match) -> Iterator[Requirement]:
        size = shape(match.x)[-1]
        yield need(isinstance(size, int), "the size to rotate is not known", match.x)
        yield from self._check_pairs(match, size)
        for table in (match.cos, match.sin):
            full = rank(table) > 0 and size_equal(shape(table)[-1], size)
            yield need(full, "cos and sin do not have a value for each rotated entry", table)
        same = sizes_equal(shape(match.rotated), shape(match.x))
        yield need(same, "the rotation changes the shape", match.rotated)
        if match.extent == "partial":
            yield need(rest_of(match.x, match.passed) is not None, "what is appended is not the rest", match.passed)

    def _check_pairs(self, match: Match, size: Any) -> Iterator[Requirement]:
        start, parts = match.get("start", 0), match.layout.removesuffix(" back")
        middle, end = start + size // 2, start + size
        if parts == "halves":
            first, second = (match.first_start, match.first_end), (match.second_start, match.second_end)
            halves = (start, middle), (middle, end)
            yield need((second, first) != halves, "the halves are swapped: the first one is negated", match.turned)
            yield need((first, second) == halves, "the parts are not the two halves", match.turned)
            return
        odd, even = (start + 1, start) if parts == "steps" else (1, 0)
        yield need((match.even, match.odd) != (odd, even), "the first entry of each pair is negated", match.turned)
        yield need((match.even, match.odd) == (even, odd), "the parts are not the entries of pairs", match.turned)
        if parts == "picks":
            yield need(is_paired(match.pairs, match.x), "the pairs are not neighbours in the input", match.pairs)
        else:
            ends = (match.odd_end, match.even_end) == (end, end)
            yield need(ends and size % 2 == 0, "the parts do not cover the input", match.turned)

    def replace(self, match: Match, build: Builder) -> Replacement:
        layout = "half" if match.layout.startswith("halves") else "interleaved"
        cos, sin = match.cos, match.sin
        if "decay" in match:
            cos, sin = (build.call(aten.mul.Tensor, table, match.decay) for table in (cos, sin))
        if match.layout.endswith(" back") != is_call(match.rotated, (aten.sub.Tensor,)):
            sin = build.call(aten.neg.default, sin)
        x, size = match.x, shape(match.x)[-1]
        base = deinterleaved(x) if layout == "half" else None
        if match.extent == "partial":
            x = rest_of(x, match.passed)
        elif base is not None:
            layout = "interleaved_to_half"
            x = base if sizes_equal(shape(base), shape(x)) else build.call(aten.reshape.default, base, x.args[1])
        elif "start" in match or match.get("base") not in (None, x):
            x = again(x, build)
        if "raised" in match:
            x = build.call(aten.to.dtype, x, match.wide)
        return build.call(ops.rope, x, cos, sin, size, layout)
