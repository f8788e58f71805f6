"""Merge, attend, put back: each attention runs on fewer tokens, and the residual stream keeps all of them.

The safest form of reduction (Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023): whatever
reads the stream, convolutions and skip connections too, finds every token in its place. Only attention gets cheaper.
Here merged tokens count by their sizes, so that equal tokens merge without a change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import arguments, is_call, rank, shape, size_equal
from regraft.ir.ops.plan_merge import most_removable
from regraft.ir.program import Program
from regraft.passes.applied import log_applied
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Batch, Span, plain
from regraft.passes.tokens.legality import causal, check_mask, hiding_bias
from regraft.passes.tokens.methods import Method
from regraft.passes.tokens.order import after_inputs, move_behind
from regraft.passes.tokens.padding import padding_of
from regraft.passes.tokens.planner import Planner
from regraft.passes.tokens.rebuild import Rebuild
from regraft.passes.tokens.reduce import refusal, removals
from regraft.passes.tokens.sites import Site, attentions, join_of, projection
from regraft.passes.tokens.stages import Stages, batch_size
from regraft.passes.tokens.step import Duty, barrier
from regraft.passes.tokens.walk import Walk

aten = torch.ops.aten


@dataclass(frozen=True)
class BracketAttention(Pass):
    """Let self-attentions run on merged tokens.

    ``schedule``: how many tokens are merged away inside each, in the order of the graph, or one number for all.
    ``metric``: what is compared, "stream" (what the attention is a projection of) or "random" (a baseline with
    ``seed``). It runs on recognised programs, before linear layers are merged. Raises ``ReductionError`` for a schedule
    that does not fit; sites that cannot be bracketed are refused in the log.
    """

    schedule: tuple[int, ...] | int
    metric: str = "stream"
    seed: int = 0

    def run(self, program: Program, session: Session) -> int:
        sites = attentions(program)
        made = 0
        for node, remove in removals(self.schedule, sites).items():
            if not remove or session.fuel.empty:
                continue
            try:
                removed = _Bracket(program, node).write(self, remove)
            except Refused as refused:
                session.log.refusals.append(refusal(self.name, node, refused))
                continue
            made += 1
            self._log(session, node, removed)
        DropDeadCode().run(program, session)
        program.graph.lint()
        return made

    def _log(self, session: Session, node: fx.Node, removed: int) -> None:
        made = (f"{removed} of {shape(node)[2]} tokens",)
        log_applied(session, self.name, Exactness.LOSSY, (node.name,), made, node)


@dataclass
class _Bracket:
    """One attention: what it is a projection of, and the sum that its output joins."""

    program: Program
    attention: fx.Node

    def write(self, options: BracketAttention, remove: int) -> int:
        """Write the bracket; returns how many tokens go inside. Raises ``Refused``, and changes nothing then."""
        given = arguments(self.attention)
        products = [projection(given[name]) for name in ("query", "key", "value")]
        sources = {product.all_input_nodes[0] for product in products if product is not None}
        if None in products or len(sources) != 1:
            raise Refused("query, key and value are not projections of the same tokens", self.attention)
        join, source = join_of(self.attention), sources.pop()
        readers = [product for product in products if product is not None]
        if is_call(source, (aten.permute.default,)) and source.args[1] == [1, 0, 2]:
            readers, source = [source], source.all_input_nodes[0]  # nn.MultiheadAttention has the tokens in front
        self._check(source)
        told = self._told()
        for node in told:
            move_behind(node, source)
        with self.program.graph.inserting_after(max([after_inputs(source), *told])):
            inside = self.program.graph.call_function(aten.alias.default, (source,))
        inside.meta = dict(source.meta)
        for reader in dict.fromkeys(readers):
            reader.replace_input_with(source, inside)
        try:
            return self._merge(options, remove, inside, join)
        except Refused:
            inside.replace_all_uses_with(source, propagate_meta=False)
            self.program.graph.erase_node(inside)
            raise

    def _told(self) -> list[fx.Node]:
        """The tensors that say which tokens are there: a plan reads them in front of the attention."""
        bias, tensors = hiding_bias(self.program, self.attention), arguments(self.attention)["mask_tensors"]
        numbers = frozenset().union(*map(tensors_of, padding_of(self.attention)))
        return [*(tensors[number] for number in sorted(numbers)), *([] if bias is None else [bias])]

    def _check(self, source: fx.Node) -> None:
        if rank(source) != 3 or not isinstance(shape(source)[1], int):
            raise Refused("the tokens are not laid out as batch, tokens and width of a known length", source)
        if size_equal(shape(source)[0], shape(self.attention)[2]) and not size_equal(*shape(source)[:2]):
            raise Refused("the tokens lie in front of the samples, and a bracket wants them behind", source)
        if shape(source)[1] != shape(self.attention)[2]:
            raise Refused("the batch of the attention is made of windows or groups of the samples", self.attention)
        check_mask(self.program, self.attention)
        if causal(self.attention):
            raise Refused("a token put back would have seen later ones", self.attention)

    def _merge(self, options: BracketAttention, remove: int, inside: fx.Node, join: fx.Node) -> int:
        walk = self._walk(inside, join)
        tokens = walk.tokens
        remove = min(remove, most_removable(tokens, "bipartite", 0, 0))
        stages = Stages(tokens, 0, inside.meta["val"].device)
        rebuild = Rebuild(self.program, walk, stages)
        with rebuild.whole():
            build = rebuild.builder(inside.next, inside)
            stages.batch = batch_size(build, inside, walk.layouts[inside])
            planner = Planner(self.program, Method(options.metric, "bipartite"), options.seed, 0, 0)
            plan = planner.plan(rebuild, build, Site(self.attention, inside), inside, remove)
            rebuild.new[inside] = stages.reduce(build, plan, inside, remove, weigh=True)
            rebuild.stage[inside] = stages.last
            for node in list(walk.steps):
                rebuild.node(node)
        return remove

    def _walk(self, inside: fx.Node, join: fx.Node) -> Walk:
        """From the merged tokens to the sum, which is a barrier."""
        batch, tokens, width = shape(inside)
        walk = Walk(tokens, {inside: ((Batch(batch),), (Span(0, tokens),), *plain([width]))})
        node = inside.next
        while node is not join and node.op != "output":
            walk.step(node)
            node = node.next
        step = walk.steps.get(self.attention)
        if step is None or step.duty is not Duty.ATTENTION or not walk.moving(join):
            reasons = [found.reason for found in walk.steps.values() if found.reason]
            raise Refused(reasons[0] if reasons else "the tokens do not reach the sum", self.attention)
        walk.steps[join] = barrier("the bracket ends")
        return walk
