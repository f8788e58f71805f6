"""Repeating key and value heads for grouped queries: every spelling is ``repeat_interleave(x, repeats, dim)``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, rank, shape, size_equal
from regraft.ir.pattern import anything, expand, reshape, unsqueeze
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


@identity(aten.repeat.default)
def repeat_is_expand(node: fx.Node, build: Builder) -> fx.Node | None:
    """repeat of dims of size one only is expand."""
    x, repeats = node.args
    assert isinstance(x, fx.Node) and isinstance(repeats, (list, tuple))
    if len(repeats) != rank(x) or any(not isinstance(size, int) for size in repeats):
        return None
    if any(times != 1 and not size_equal(size, 1) for times, size in zip(repeats, shape(x), strict=True)):
        return None
    sizes = [times if times != 1 else build.size(x, dim) for dim, times in enumerate(repeats)]
    return build.call(aten.expand.default, x, sizes)


@identity(aten.repeat_interleave.self_int)
def negative_repeat_dim(node: fx.Node, build: Builder) -> fx.Node | None:
    """repeat_interleave counts its dim from the end."""
    given = arguments(node)
    x, dim = given["self"], given["dim"]
    if dim is None or dim < 0:
        return None
    return build.call(aten.repeat_interleave.self_int, x, given["repeats"], dim - rank(x))


class RepeatHeads(Rule):
    """reshape(expand(unsqueeze(x, d))) that copies each entry of the dim before ``d`` is repeat_interleave."""

    exactness = Exactness.BITWISE
    quiet = True

    def pattern(self, x: Any) -> Any:
        widened = expand(unsqueeze(x, anything("dim")), anything()).named("widened")
        return reshape(widened, anything())

    def check(self, match: Match) -> Iterator[Requirement]:
        place = match.dim + rank(match.widened)
        yield need(place >= 1, "nothing stands before the new dim")
        yield need(isinstance(shape(match.widened)[place], int), "the number of copies is symbolic")
        yield need(self._only_copies(match, place), "the expand changes other dims too")
        yield need(self._merges(match, place), "the reshape does not merge the copies into the dim before them")

    def replace(self, match: Match, build: Builder) -> Replacement:
        place = match.dim + rank(match.widened)
        repeats = shape(match.widened)[place]
        return build.call(aten.repeat_interleave.self_int, match.x, repeats, place - 1 - rank(match.x))

    def _only_copies(self, match: Match, place: int) -> bool:
        widened = shape(match.widened)
        kept = widened[:place] + widened[place + 1 :]
        return all(size_equal(a, b) for a, b in zip(kept, shape(match.x), strict=True))

    def _merges(self, match: Match, place: int) -> bool:
        before, after = shape(match.x), shape(match.root)
        if len(before) != len(after):
            return False
        others = [(a, b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != place - 1]
        merged = before[place - 1] * shape(match.widened)[place]
        return all(size_equal(a, b) for a, b in others) and size_equal(merged, after[place - 1])


SPELLINGS = (repeat_is_expand, negative_repeat_dim, RepeatHeads())
