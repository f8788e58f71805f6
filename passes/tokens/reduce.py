"""Reduce the tokens of a recognised program: a plan and a merge behind the attention of each chosen block.

The pass is lossy and in no default pipeline. With nothing to remove it leaves the program as it is, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, shape, user_line
from regraft.ir.ops.matchings import ORDERED
from regraft.ir.ops.plan_merge import most_removable
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.passes.applied import log_applied
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.refused import Refused
from regraft.passes.tokens.errors import ReductionError
from regraft.passes.tokens.layout import span_dim
from regraft.passes.tokens.legality import Legality, causal, walks
from regraft.passes.tokens.methods import METHODS, Method
from regraft.passes.tokens.planner import Planner
from regraft.passes.tokens.rebuild import Rebuild
from regraft.passes.tokens.rows import from_rows, to_rows
from regraft.passes.tokens.sites import Site, attentions
from regraft.passes.tokens.stages import Stages, batch_size


@dataclass(frozen=True)
class ReduceTokens(Pass):
    """Remove tokens behind self-attentions.

    ``schedule``: how many tokens go behind each self-attention, in the order of the graph (``examine`` lists them), or
    one number for all. ``method``: a name in ``METHODS``. ``protect`` and ``protect_end``: tokens in front and at the
    end that stay, besides those that the graph shows to be special. ``seed``: of the random baselines. It runs on
    recognised programs, before linear layers are merged. Sites that cannot be reduced are refused in the log; a number
    that is larger than what a site can give is cut down, which the log says too. Raises ``ReductionError`` for a
    schedule that does not fit.
    """

    schedule: tuple[int, ...] | int
    method: str = "tome"
    protect: int = 0
    seed: int = 0
    protect_end: int = 0

    def run(self, program: Program, session: Session) -> int:
        method = METHODS.get(self.method)
        if method is None:
            raise ReductionError(f"the method {self.method!r} is not known; known: {', '.join(METHODS)}")
        if isinstance(self.schedule, int) and self.schedule == 0:
            return 0
        numbers = [*removals(self.schedule, attentions(program)).values()]
        found = walks(program, self.protect, method.drops, self.protect_end)
        return sum(self._reduce(program, session, method, walk, numbers) for walk in found)

    def _reduce(self, program: Program, session: Session, method: Method, found: Legality, numbers: list[int]) -> int:
        """Reduce the tokens of one walk; returns at how many sites."""
        wanted = {node: number for node, number in zip(found.attentions, numbers, strict=True) if number}
        for node, refused in found.refused.items():
            if node in wanted and node in found.reached:
                session.log.refusals.append(refusal(self.name, node, refused))
        sites = {site: wanted[node] for node, site in found.sites.items() if node in wanted}
        if session.fuel.left is not None:
            sites = dict(list(sites.items())[: max(session.fuel.left, 0)])
        return _Run(program, session, self, method, found, sites).run() if sites else 0


def removals(schedule: tuple[int, ...] | int, attentions: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """How many tokens go at each self-attention. Raises ``ReductionError``."""
    count = len(attentions)
    numbers = (schedule,) * count if isinstance(schedule, int) else schedule
    if len(numbers) != count:
        raise ReductionError(
            f"a schedule of {len(numbers)} numbers was given for a program with {count} self-attentions; "
            "give one number for each, 0 where no token goes"
        )
    if any(number < 0 for number in numbers):
        raise ReductionError(f"the schedule {numbers} removes a negative number of tokens; give 0 or more")
    return dict(zip(attentions, numbers, strict=True))


def refusal(name: str, site: fx.Node, refused: Refused) -> Refusal:
    """What the log says about a site."""
    at = refused.node if refused.node is not None and user_line(refused.node) else site
    reason = refused.reason if refused.node is None else f"{refused.reason} ({refused.node.name})"
    return Refusal(name, name, "requirement", site.name, reason, user_line(at))


@dataclass
class _Run:
    """One run of the pass over one program."""

    program: Program
    session: Session
    options: ReduceTokens
    method: Method
    found: Legality
    wanted: dict[Site, int]

    def __post_init__(self) -> None:
        ends = self.found.prefix, self.found.suffix
        self.planner = Planner(self.program, self.method, self.options.seed, *ends)

    def run(self) -> int:
        """Rewrite; nothing stays changed where a site turns out to be refused after all."""
        walk = self.found.walk
        assert walk is not None
        first = next(iter(self.wanted)).anchor
        stages = Stages(walk.tokens, 0, first.meta["val"].device)
        rebuild = Rebuild(self.program, walk, stages)
        anchors = {site.anchor: site for site in self.wanted}
        observed = {site.anchor: site for site in self.found.sites.values()} if self.method.running else {}
        made: list[tuple[Site, int]] = []
        node = first
        try:
            with rebuild.whole():
                for node in list(self.program.graph.nodes):
                    if node in walk.steps:
                        rebuild.node(node)
                    if node in anchors:
                        removed = self._reduce(rebuild, anchors[node])
                        made += [(anchors[node], removed)] if removed else []
                    elif node in observed:
                        self._observe(rebuild, observed[node])
        except Refused as refused:
            at = refused if refused.node is not None else Refused(refused.reason, node)
            self.session.log.refusals += [refusal(self.options.name, site.attention, at) for site in self.wanted]
            return 0
        for site, removed in made:
            self._log(site, removed)
        DropDeadCode().run(self.program, self.session)
        self.program.drop_unused_weights()
        self.program.graph.lint()
        return len(made)

    def _reduce(self, rebuild: Rebuild, site: Site) -> int:
        """Plan and merge behind ``site``; returns how many tokens go."""
        stages, found = rebuild.stages, self.found
        build = rebuild.builder(site.anchor.next, site.anchor)
        self._begin(rebuild, build, site)
        if causal(site.attention) and self.method.matching not in ORDERED:
            raise Refused(f"the method {self.options.method} cannot keep a causal order", site.attention)
        left = stages.left(stages.last)
        most = most_removable(left, self.method.matching, found.prefix, found.suffix)
        remove = min(self.wanted[site], most)
        if remove < self.wanted[site]:
            reason = f"of {left} tokens at most {most} can go here, and {self.wanted[site]} were to"
            self.session.log.refusals.append(refusal(self.options.name, site.attention, Refused(reason, site.anchor)))
        if not remove:
            return 0
        stage = stages.last
        layout = rebuild.walk.layouts[site.anchor]
        x = rebuild.at(build, site.anchor, stage, layout, merge=True)
        turned = span_dim(layout) != -2
        rows = to_rows(build, x, layout, stages.counts(stage)) if turned else x
        plan = self.planner.plan(rebuild, build, site, rows, remove)
        fewer = stages.reduce(build, plan, rows, remove, weigh=not self.method.drops)
        rebuild.new[site.anchor] = from_rows(build, fewer, layout, stages.counts(stages.last)) if turned else fewer
        rebuild.stage[site.anchor] = stages.last
        return remove

    def _begin(self, rebuild: Rebuild, build: Builder, site: Site) -> None:
        """Before anything goes, the batch size is what it is at the site."""
        if rebuild.stages.last == 0:
            rebuild.stages.batch = batch_size(build, site.anchor, rebuild.walk.layouts[site.anchor])

    def _observe(self, rebuild: Rebuild, site: Site) -> None:
        """Let the scores of a site where no token goes count for those behind it."""
        build = rebuild.builder(site.anchor.next, site.anchor)
        self._begin(rebuild, build, site)
        self.planner.observe(rebuild, build, site)

    def _log(self, site: Site, removed: int) -> None:
        sources = site.attention.name, site.anchor.name
        made = (f"{self.options.method}: {removed} of {shape(site.attention)[2]} tokens",)
        log_applied(self.session, self.options.name, Exactness.LOSSY, sources, made, site.anchor)
