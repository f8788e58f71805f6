"""Shard the experts of a program over the ranks of a placement plan: each site of ``regraft::moe`` becomes dispatch,
the rank's own experts, and combine."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx

from regraft.ir.driver import Driver, Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, concrete, dtype, shape, user_line
from regraft.ir.ops.moe import moe
from regraft.ir.ops.moe_combine import moe_combine
from regraft.ir.ops.moe_dispatch import moe_dispatch
from regraft.ir.pattern import Call
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.ir.transport import ALONE, WORLD
from regraft.ir.weights import WeightOp
from regraft.passes.base import Pass
from regraft.passes.experts.errors import ShardingError
from regraft.passes.experts.sharding import Sharding

_WEIGHTS = ("first", "down", "up", "first_bias", "down_bias", "up_bias")
_ROUTED = ("hidden", "index", "weight")
_T = TypeVar("_T")


class ShardSite(Rule):
    """``regraft::moe`` over the experts of one rank; ``layers`` maps the name of a site to its place in the plan. Other
    sites, the local ones that it has made among them, are left alone."""

    exactness = Exactness.REASSOCIATED

    def __init__(self, sharding: Sharding, rank: int, group: str, layers: dict[str, int]) -> None:
        self._sharding, self._rank, self._group, self._layers = sharding, rank, group, layers

    def pattern(self) -> Any:
        return Call((moe,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        if match.root.name in self._layers:
            yield from requirements(match.program, match.root)

    def replace(self, match: Match, build: Builder) -> Replacement:
        if match.root.name not in self._layers:
            return None
        layer, rank = self._layers[match.root.name], self._rank
        given = arguments(match.root)
        rows, slot, weight, token, counts = self._dispatch(match, build, self._group)
        own = self._own(match, layer)
        local = build.call(moe, rows, slot, weight, **{**_without(given, _ROUTED), **own})
        return self._combine(match, build, local, token, counts, rank, self._group)

    def rehearsal(self, match: Match, build: Builder) -> fx.Node:
        """All ranks in this process, on the tokens of this one: each serves the rows of its own slots."""
        layer = self._layers[match.root.name]
        given = arguments(match.root)
        rows, slot, weight, token, counts = self._dispatch(match, build, ALONE)
        total: fx.Node | None = None
        for rank in range(self._sharding.plan.num_ranks):
            own = self._own(match, layer) if rank == self._rank else self._of(match, layer, rank)
            here = build.call(torch.ops.aten.sub.Scalar, slot, rank * self._slots(layer))
            part = build.call(moe, rows, here, weight, **{**_without(given, _ROUTED), **own})
            total = part if total is None else build.call(torch.ops.aten.add.Tensor, total, part)
        assert total is not None
        return self._combine(match, build, total, token, counts, 0, ALONE)

    def _slots(self, layer: int) -> int:
        return self._sharding.plan.slots_per_rank[layer]

    def _dispatch(self, match: Match, build: Builder, group: str) -> list[fx.Node]:
        layer, given = self._layers[match.root.name], arguments(match.root)
        sent = build.call(
            moe_dispatch,
            *(given[name] for name in _ROUTED),
            _once(match, "copies", lambda: self._copies(match, layer)),
            ranks=self._sharding.plan.num_ranks,
            slots=self._slots(layer),
            rank=self._rank,
            layer=self._sharding.plan.layer_ids[layer],
            per_choice=self._sharding.communication == "per-expert",
            group=group,
        )
        return [build.call(operator.getitem, sent, place) for place in range(5)]

    def _combine(
        self, match: Match, build: Builder, results: fx.Node, token: fx.Node, counts: fx.Node, rank: int, group: str
    ) -> fx.Node:
        tokens = build.size(arguments(match.root)["hidden"], 0)
        ranks = self._sharding.plan.num_ranks
        return build.call(
            moe_combine, results, token, counts, tokens, ranks=ranks, dtype=dtype(match.root), rank=rank, group=group
        )

    def _copies(self, match: Match, layer: int) -> fx.Node:
        table = torch.from_numpy(self._sharding.copies(layer, self._rank).copy())
        hint = f"{match.program.weight_name(arguments(match.root)['first'])}.copies"
        return match.program.add_constant(hint, table.to(match.root.meta["val"].device))

    def _own(self, match: Match, layer: int) -> dict[str, fx.Node]:
        """This rank's experts as tensors of their own: of the others nothing stays in its program."""
        return _once(match, "own", lambda: self._sliced(match, layer))

    def _sliced(self, match: Match, layer: int) -> dict[str, fx.Node]:
        program, held = match.program, self._sharding.held(layer, self._rank)
        made = {}
        for argument, name in _weights_of(program, match.root).items():
            whole = program.weights.get(name)
            part = whole.index_select(0, torch.tensor(held, dtype=torch.int64, device=whole.device))
            made[argument] = program.add_constant(f"{name}.rank{self._rank}", part)
        return made

    def _of(self, match: Match, layer: int, rank: int) -> dict[str, fx.Node]:
        """The experts of another rank, computed while they are checked with."""
        options = {"dim": 0, "indices": list(self._sharding.held(layer, rank))}
        return {
            argument: match.program.derive_weight(f"{name}.rank{rank}", WeightOp("index", (name,), options))
            for argument, name in _weights_of(match.program, match.root).items()
        }


@dataclass(frozen=True)
class ShardExperts(Pass):
    """Shard every ``regraft::moe`` site, or, where one of them is refused, none.

    The plan holds one layer for each site, in the order of the graph. ``rank`` is the one whose program this becomes,
    ``group`` the process group that runs it. It runs on recognised programs, before linear layers are merged. Each
    site is checked with all ranks played in this process; nothing is sent. Raises ``ShardingError`` where the plan is
    not for this program's sites.
    """

    sharding: Sharding
    rank: int
    group: str = WORLD

    def run(self, program: Program, session: Session) -> int:
        sites = [node for node in program.graph.nodes if node.target is moe]
        self._check(sites)
        rule = ShardSite(self.sharding, self.rank, self.group, {site.name: at for at, site in enumerate(sites)})
        refusals = list(_refusals(program, sites, rule.name, self.name))
        if refusals:
            session.log.refusals += refusals
            session.log.of(rule.name).refused += len(refusals)
            return 0
        # one rank's program cannot be compared with the model by itself, so "final" checks the sites as "each" does
        verify = "off" if session.verify == "off" else "each"
        ours = replace(session, verify=verify)
        fired = Driver(program, (rule,), ours, self.name).run()
        session.applied = ours.applied
        if fired:
            program.drop_unused_weights()  # the whole experts, and those of other ranks
        return fired

    def _check(self, sites: list[fx.Node]) -> None:
        plan = self.sharding.plan
        if len(sites) != plan.num_layers:
            raise ShardingError(
                f"a plan of {plan.num_layers} expert layers was given for a program with {len(sites)} recognised ones; "
                "expected one for each, in the order of the graph"
            )
        for layer, site in zip(plan.layer_ids, sites, strict=True):
            experts = concrete(shape(arguments(site)["first"])[0])
            if experts != plan.num_experts:
                raise ShardingError(
                    f"a plan of {plan.num_experts} experts was given for a program that has {experts} in layer "
                    f"{layer}; plan for this model"
                )


def requirements(program: Program, site: fx.Node) -> Iterator[Requirement]:
    """What a site must be like for a rank to hold a part of its experts."""
    mutated = set(program.mutated().values())
    for name in _WEIGHTS:
        held = arguments(site)[name]
        if held is not None:
            weight = program.weight_name(held)
            yield need(weight is not None, "the weights of the experts are computed at run time", held)
            yield need(weight not in mutated, "the weights of the experts change while the model runs", held)


def _refusals(program: Program, sites: list[fx.Node], rule: str, name: str) -> Iterator[Refusal]:
    for site in sites:
        failed = next((found for found in requirements(program, site) if not found.holds), None)
        if failed is not None:
            at = failed.node if failed.node is not None and user_line(failed.node) else site
            yield Refusal(rule, name, "requirement", site.name, failed.reason, user_line(at))


def _once(match: Match, name: str, make: Callable[[], _T]) -> _T:
    """What the replacement and its rehearsal share: made for the first that asks."""
    if name not in match.facts:
        match.facts[name] = make()
    made: _T = match.facts[name]
    return made


def _weights_of(program: Program, site: fx.Node) -> dict[str, str]:
    """The names of the expert weights, by argument; several arguments may be one weight."""
    given = arguments(site)
    return {name: str(program.weight_name(given[name])) for name in _WEIGHTS if given[name] is not None}


def _without(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}
