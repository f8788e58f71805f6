"""Recognise rotary position embedding by its two outputs: ``(a cos - b sin, b cos + a sin)``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import Builder, arguments, is_call, rank, shape, size_equal, sizes_equal
from regraft.ir.pattern import Call, add, anything, cat, either, mul, neg, operator, reshape, sub
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import rope_pairs_examples as shown
from regraft.passes.recognize.pairs import flat_pairs
from regraft.passes.recognize.reading import slice_of

aten = torch.ops.aten
stack = operator(aten.stack.default)


class RecognizeRopePairs(Rule):
    """The two parts of each pair are computed apart and then joined; the tables have one value a pair."""

    recognizes = "rope"
    landmark = "second"
    examples = shown.EXAMPLES
    near_misses = shown.NEAR_MISSES

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        first, second = (
            Call((aten.slice.Tensor, aten.select.int), (x, -1), name=n, loose=True) for n in ("first", "second")
        )
        turns = either(
            forth=[_minus(mul(first, cos), second, sin), add(mul(second, cos), mul(first, sin))],
            back=[add(mul(first, cos), mul(second, sin)), _minus(mul(second, cos), first, sin)],
            tag="way",
        )
        return either(
            halves=cat(turns, -1),
            pairs=reshape(stack(turns, -1), anything()),
            tag="written",
        )

    def check(self, match: Match) -> Iterator[Requirement]:
        source = parts_of(match.first, match.second)
        yield need(source is not None, "the parts are not the two halves or the entries of pairs", match.first)
        read = source.read if source is not None else ""
        yield need((read, match.written) != ("halves", "pairs"), "reads halves and writes pairs", match.root)
        for table in (match.cos, match.sin):
            full = rank(table) > 0 and size_equal(shape(table)[-1], shape(match.first)[-1])
            yield need(full, "cos and sin do not have one value for each pair", table)
        parts = _parts(match.root)
        same = all(sizes_equal(shape(part), shape(match.first)) for part in parts)
        yield need(same, "the rotation changes the shape", parts[0])

    def replace(self, match: Match, build: Builder) -> Replacement:
        source = parts_of(match.first, match.second)
        assert source is not None
        size = shape(match.first)[-1] * 2
        x = source.node
        if source.bounds is None:
            x = flat_pairs(x, build)
        elif source.bounds != (0, shape(x)[-1]):
            x = build.call(aten.slice.Tensor, x, -1, *source.bounds)
        layout = "interleaved" if match.written == "pairs" else "interleaved_to_half"
        layout = "half" if source.read == "halves" else layout
        sin = match.sin if match.way == "forth" else build.call(aten.neg.default, match.sin)
        result = build.call(ops.rope, x, match.cos, sin, size, layout)
        if sizes_equal(shape(result), shape(match.root)):
            return result
        return build.call(aten.reshape.default, result, match.root.args[1])


def _minus(product: Any, part: Any, sin: Any) -> Any:
    """``product - part * sin`` in its spellings."""
    return either(
        sub(product, mul(part, sin)),
        add(product, neg(mul(part, sin))),
        add(product, mul(neg(part), sin)),
        add(product, mul(part, neg(sin))),
    )


def _parts(root: fx.Node) -> list[fx.Node]:
    """The two parts of each pair that ``root`` joins."""
    joined = root.args[0] if is_call(root, (aten.reshape.default,)) else root
    assert isinstance(joined, fx.Node)
    return list(joined.args[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Source:
    """What the two parts are read from: its "halves" or the entries of its "pairs".

    ``bounds`` is the range of the last dimension that they cover; None where that dimension holds one pair.
    """

    node: fx.Node
    read: str
    bounds: tuple[int, int] | None


def parts_of(first: fx.Node, second: fx.Node) -> Source | None:
    """Where the two parts lie in what they are read from; None when they do not make pairs."""
    one, other = slice_of(first), slice_of(second)
    if one is not None and other is not None:
        whole, start, middle, step = one
        _, other_start, end, other_step = other
        size = shape(first)[-1]
        if (step, other_step, other_start, middle, end) == (1, 1, middle, start + size, start + 2 * size):
            return Source(whole, "halves", (start, end))
        neighbours = (step, other_step, other_start) == (2, 2, start + 1) and end == start + 2 * size
        return Source(whole, "pairs", (start, end)) if neighbours and middle in (end, end - 1) else None
    if is_call(first, (aten.select.int,)) and is_call(second, (aten.select.int,)):
        pairs = arguments(first)["self"]
        picked = arguments(first)["index"], arguments(second)["index"]
        return Source(pairs, "pairs", None) if picked == (0, 1) and size_equal(shape(pairs)[-1], 2) else None
    return None
