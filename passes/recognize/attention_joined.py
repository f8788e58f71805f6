"""Attentions on slices of the heads whose outputs are joined again are one attention, whose mask differs by head.

So long-short attention (arXiv:2505.15548) is written with two calls, and heads that stream beside heads that do not.
One call reads the projections as they are: no head is copied apart and together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.mask import And, Everything, Or, Predicate, heads, parse, simplify
from regraft.ir.mask.predicate import renumber
from regraft.ir.nodes import Builder, arguments, is_call, rank, shape, size_equal
from regraft.ir.pattern import anything, cat
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import attention_joined_examples as shown

aten = torch.ops.aten
_SAME = ("scale", "mask_fill", "empty_rows", "softcap")
_PER_HEAD = ("bias", "slopes", "sinks")


class JoinHeads(Rule):
    """``cat`` over heads of attentions on all slices of the heads of one query, key and value."""

    examples = shown.JOINED
    near_misses = shown.JOINED_NEAR_MISSES

    def pattern(self) -> Any:
        return cat(anything("parts"), -3)

    def check(self, match: Match) -> Iterator[Requirement]:
        parts = list(match.parts)
        if len(parts) < 2 or not all(is_call(part, (ops.attention,)) for part in parts):
            return  # other things are joined along this dim too
        given = [arguments(part) for part in parts]
        alone = all(len(part.users) == 1 for part in parts)
        yield need(alone, "an attention's heads are read elsewhere", at=match.root)
        plain = all(one[name] is None for one in given for name in _PER_HEAD)
        yield need(plain, "an attention has a bias, slopes or sinks of its own", at=match.root)
        same = all(one[name] == given[0][name] for one in given for name in _SAME)
        yield need(same, "the attentions differ in more than their masks", at=match.root)
        yield need(not any(map(_says_heads, given)), "a mask says heads already", at=match.root)
        groups = {_heads(one["query"]) / _heads(one["key"]) for one in given}
        yield need(len(groups) == 1, "the attentions have groups of different sizes", at=match.root)
        wholes = [_whole([one[name] for one in given]) for name in ("query", "key", "value")]
        yield need(None not in wholes, "the heads are not slices of one tensor that follow one another", at=match.root)
        match.facts["wholes"] = wholes

    def replace(self, match: Match, build: Builder) -> Replacement:
        if "wholes" not in match.facts:
            return None
        given = [arguments(part) for part in match.parts]
        masks: list[Predicate] = []
        tensors: list[fx.Node] = []
        first = 0
        for one in given:
            end = first + _heads(one["query"])
            places = {place: len(tensors) + place for place in range(len(one["mask_tensors"]))}
            masks.append(And((heads(first, end), renumber(parse(one["mask"]), places))))
            tensors += one["mask_tensors"]
            first = end
        mask = simplify(Or(tuple(masks))) if {one["mask"] for one in given} != {"all"} else Everything()
        text = "all" if isinstance(mask, Everything) else str(mask)
        options = {name: given[0][name] for name in _SAME}
        wholes = [whole.build(build) for whole in match.facts["wholes"]]
        return build.call(ops.attention, *wholes, tensors, None, None, None, mask=text, **options)


def _heads(node: fx.Node) -> int:
    return int(shape(node)[1])


def _says_heads(given: dict[str, Any]) -> bool:
    apart = any(rank(tensor) > 2 and shape(tensor)[-3:-2] not in ((), (1,)) for tensor in given["mask_tensors"])
    return apart or "heads(" in given["mask"]


@dataclass(frozen=True)
class _Heads:
    """Heads ``start`` to ``end - 1`` of ``source``."""

    source: fx.Node
    start: int
    end: int

    def build(self, build: Builder) -> fx.Node:
        """They alone."""
        if self.start == 0 and size_equal(shape(self.source)[1], self.end):
            return self.source
        return build.call(aten.slice.Tensor, self.source, -3, self.start, self.end)


def _whole(parts: Sequence[fx.Node]) -> _Heads | None:
    """What the parts are when they are slices of one tensor's heads that follow one another."""
    if not all(is_call(part, (aten.slice.Tensor,)) and rank(part) == 4 for part in parts):
        return None
    given = [arguments(part) for part in parts]
    source, start = given[0]["self"], given[0]["start"] or 0
    end = start
    for part, one in zip(parts, given, strict=True):
        if one["self"] is not source or one["dim"] != -3 or one["step"] != 1 or (one["start"] or 0) != end:
            return None
        end += _heads(part)
    return _Heads(source, start, end)
