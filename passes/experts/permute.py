"""Permute the experts of a program: their weights, the router's rows, and all between its product and its choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from regraft.ir.driver import Driver, Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, concrete, shape, user_line
from regraft.ir.ops.moe import moe
from regraft.ir.pattern import Call
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.base import Pass
from regraft.passes.experts.errors import PermutationError
from regraft.passes.experts.permutation import Permutation, permutations_of
from regraft.passes.experts.router import Rewrite, read_site
from regraft.passes.refused import Refused
from regraft.solvers.placement.plan import Plan


class PermuteSite(Rule):
    """``regraft::moe`` over permuted experts and a permuted router; ``orders`` maps the name of a site to its
    permutation. Other sites, those it has permuted among them, are left alone."""

    exactness = Exactness.REASSOCIATED

    def __init__(self, orders: dict[str, Permutation]) -> None:
        self._orders = orders

    def pattern(self) -> Any:
        return Call((moe,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        order = self._orders.get(match.root.name)
        if order is not None:
            found = analyse(match.program, match.root, order)
            match.facts["rewrite"] = found
            if isinstance(found, Refused):
                yield need(False, found.reason, found.node)

    def replace(self, match: Match, build: Builder) -> Replacement:
        rewrite = match.facts.get("rewrite")
        return rewrite.build(build) if isinstance(rewrite, Rewrite) else None


@dataclass(frozen=True)
class PermuteExperts(Pass):
    """Permute every ``regraft::moe`` site, or, where one of them is refused, none.

    ``permutations`` holds one for each site, in the order of the graph. It runs on recognised programs, before linear
    layers are merged. Raises ``PermutationError`` where the permutations are not for this program's sites.
    """

    permutations: tuple[Permutation, ...]

    @classmethod
    def of_plan(cls, plan: Plan) -> PermuteExperts:
        """The pass of a plan without replicas; raises ``PermutationError``."""
        return cls(tuple(permutations_of(plan).values()))

    def run(self, program: Program, session: Session) -> int:
        sites = [node for node in program.graph.nodes if node.target is moe]
        self._check(sites)
        orders = {site.name: order for site, order in zip(sites, self.permutations, strict=True)}
        rule = PermuteSite({name: order for name, order in orders.items() if not order.is_identity})
        refusals = list(self._refusals(program, sites, rule.name))
        if refusals:
            session.log.refusals += refusals
            session.log.of(rule.name).refused += len(refusals)
            return 0
        fired = Driver(program, (rule,), session, self.name).run()
        if fired:
            program.drop_unused_weights()  # what only the old routers read
        return fired

    def _check(self, sites: list[fx.Node]) -> None:
        if len(sites) != len(self.permutations):
            raise PermutationError(
                f"permutations for {len(self.permutations)} layers were given for a program with {len(sites)} "
                "recognised expert layers; expected one for each, in the order of the graph"
            )
        for number, (site, order) in enumerate(zip(sites, self.permutations, strict=True)):
            experts = concrete(shape(arguments(site)["first"])[0])
            if experts != len(order):
                raise PermutationError(
                    f"a permutation of {len(order)} experts was given for expert layer {number} of the program, which "
                    f"has {experts}; plan for this model"
                )

    def _refusals(self, program: Program, sites: list[fx.Node], rule: str) -> Iterator[Refusal]:
        for site, order in zip(sites, self.permutations, strict=True):
            found = None if order.is_identity else analyse(program, site, order)
            if isinstance(found, Refused):
                at = found.node if found.node is not None and user_line(found.node) else site
                yield Refusal(rule, self.name, "requirement", site.name, found.reason, user_line(at))


def analyse(program: Program, site: fx.Node, order: Permutation) -> Rewrite | Refused:
    """How to permute one site, or why it is not done."""
    try:
        return read_site(program, site, order)
    except Refused as refused:
        return refused
