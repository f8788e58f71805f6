"""Attention sharded over the ranks of a process group: each computes some heads, or attends to some keys.

The rest of the model runs on every rank alike, on the same inputs, so that every rank has the whole output. By heads,
what the ranks made is put side by side. By keys, each rank's part comes with its log-sum-exp, and the parts are merged
by these (the distributed attention of "A Unified View of Long-Sequence Models", arXiv:2302.06218, over heads or tiles).
Projections stay whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from regraft.ir.driver import Driver, Session
from regraft.ir.exactness import Exactness
from regraft.ir.mask import names_heads, parse
from regraft.ir.nodes import Builder, arguments, dtype, rank, shape
from regraft.ir.ops.attention import attention
from regraft.ir.ops.attention_part import attention_merge, attention_part
from regraft.ir.ops.gather import gather
from regraft.ir.pattern import Call
from regraft.ir.program import Program
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.ir.transport import WORLD
from regraft.passes.attention.errors import AttentionError
from regraft.passes.base import Pass

aten = torch.ops.aten
HEADS, KEYS = "heads", "keys"
_PART = ("scale", "mask", "mask_fill", "softcap")


@dataclass(frozen=True)
class ShardAttention(Pass):
    """Shard every ``regraft::attention`` of a recognised program ``by`` "heads" or "keys".

    ``rank`` of ``ranks`` is the one whose program this becomes, ``group`` the process group that runs it. Each site is
    checked with all ranks played in this process; nothing is sent. A site that cannot be shared stays whole on every
    rank, with the reason in the report. Raises ``AttentionError`` for ranks that cannot be.
    """

    ranks: int
    rank: int
    by: str = HEADS
    group: str = WORLD

    def __post_init__(self) -> None:
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise AttentionError(f"rank {self.rank} of {self.ranks} was given; give a rank from 0 to below the ranks")
        if self.by not in (HEADS, KEYS):
            raise AttentionError(f"attention was to be sharded by {self.by!r}; give 'heads' or 'keys'")

    def run(self, program: Program, session: Session) -> int:
        sites = frozenset(node.name for node in program.graph.nodes if node.target is attention)
        rule = ShardHeads(self, sites) if self.by == HEADS else ShardKeys(self, sites)
        # one rank's program cannot be compared with the model by itself, so "final" checks the sites as "each" does
        ours = replace(session, verify="off" if session.verify == "off" else "each")
        fired = Driver(program, (rule,), ours, self.name).run()
        session.applied = ours.applied
        return fired


class ShardHeads(Rule):
    """Attention over some of the heads; the local one that it makes is not among ``sites``."""

    exactness = Exactness.REASSOCIATED

    def __init__(self, how: ShardAttention, sites: frozenset[str]) -> None:
        self._how, self._sites = how, sites

    def pattern(self) -> Any:
        return Call((attention,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        if match.root.name in self._sites:
            yield from self._requirements(arguments(match.root))

    def _requirements(self, given: dict[str, Any]) -> Iterator[Requirement]:
        heads, kv_heads, ranks = shape(given["query"])[1], shape(given["key"])[1], self._how.ranks
        yield need(heads % ranks == 0, f"{heads} heads cannot be shared by {ranks} ranks evenly")
        yield need(
            kv_heads % ranks == 0 or ranks % kv_heads == 0,
            f"{heads} heads that share {kv_heads} keys and values cannot be cut into {ranks} parts of whole groups",
        )
        yield need(not names_heads(parse(given["mask"])), "the mask differs from head to head by their numbers")

    def replace(self, match: Match, build: Builder) -> Replacement:
        if match.root.name not in self._sites:
            return None
        how = self._how
        own = self._of(match, build, how.rank)
        parts = build.call(gather, own, ranks=how.ranks, rank=how.rank, group=how.group)
        aside = build.call(aten.permute.default, parts, [1, 0, 2, 3, 4])
        return build.call(aten.reshape.default, aside, [build.size(match.root, dim) for dim in range(4)])

    def rehearsal(self, match: Match, build: Builder) -> fx.Node:
        """All ranks in this process."""
        parts = [self._of(match, build, number) for number in range(self._how.ranks)]
        return build.call(aten.cat.default, parts, 1)

    def _of(self, match: Match, build: Builder, number: int) -> fx.Node:
        given, ranks = arguments(match.root), self._how.ranks
        heads, kv_heads = shape(given["query"])[1], shape(given["key"])[1]
        first, last = heads * number // ranks, heads * (number + 1) // ranks
        groups = heads // kv_heads

        def some(tensor: fx.Node | None, dim: int) -> fx.Node | None:
            """The part of a tensor that has the heads along ``dim``, counted from the end; another broadcasts."""
            if tensor is None or rank(tensor) < -dim or shape(tensor)[dim] != heads or heads == 1:
                return tensor
            return build.call(aten.slice.Tensor, tensor, dim, first, last)

        own = {name: some(given[name], -1) for name in ("slopes", "sinks")}
        own |= {name: some(given[name], -3) for name in ("query", "bias")}
        for name in ("key", "value"):
            own[name] = build.call(aten.slice.Tensor, given[name], 1, first // groups, -(-last // groups))
        masks = [some(tensor, -3) if rank(tensor) == 4 else tensor for tensor in given["mask_tensors"]]
        return build.call(attention, **{**given, **own, "mask_tensors": masks})


class ShardKeys(Rule):
    """Attention to some of the keys, merged with that of the other ranks."""

    exactness = Exactness.REASSOCIATED

    def __init__(self, how: ShardAttention, sites: frozenset[str]) -> None:
        self._how, self._sites = how, sites

    def pattern(self) -> Any:
        return Call((attention,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        keys = shape(arguments(match.root)["key"])[2]
        yield need(isinstance(keys, int), "the number of keys is symbolic; shard by heads, or fix the length")
        if isinstance(keys, int):
            yield need(keys >= self._how.ranks, f"{keys} keys are fewer than {self._how.ranks} ranks")

    def replace(self, match: Match, build: Builder) -> Replacement:
        how = self._how
        own = self._of(match, build, how.rank)
        parts = build.call(gather, own, ranks=how.ranks, rank=how.rank, group=how.group)
        return self._merged(match, build, parts)

    def rehearsal(self, match: Match, build: Builder) -> fx.Node:
        """All ranks in this process."""
        parts = [self._of(match, build, number) for number in range(self._how.ranks)]
        return self._merged(match, build, build.call(aten.stack.default, parts))

    def _merged(self, match: Match, build: Builder, parts: fx.Node) -> fx.Node:
        empty_rows = "nan" if arguments(match.root)["sinks"] is not None else arguments(match.root)["empty_rows"]
        return build.call(attention_merge, parts, dtype=dtype(match.root), empty_rows=empty_rows)

    def _of(self, match: Match, build: Builder, number: int) -> fx.Node:
        given, ranks = arguments(match.root), self._how.ranks
        keys = shape(given["key"])[2]
        first, last = keys * number // ranks, keys * (number + 1) // ranks
        own = {name: build.call(aten.slice.Tensor, given[name], 2, first, last) for name in ("key", "value")}
        common = {name: given[name] for name in ("query", "mask_tensors", "bias", "slopes", *_PART)}
        sinks = given["sinks"] if number == 0 else None  # they take weight once
        return build.call(attention_part, **common, **own, sinks=sinks, first=first, keys=keys)
