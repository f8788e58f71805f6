"""Unpadding: between the embedding and the output of an encoder, a padded batch is computed packed.

Exact: a token that is there gets what it got. What was computed for padding is not computed at all; a program that
reads it is refused, unless zeros will do.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import fx

from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.mask import Everything, Predicate, to_dense
from regraft.ir.nodes import Builder, arguments, is_call, rank, shape, size_equal
from regraft.ir.program import Program
from regraft.passes.applied import log_applied
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Batch, Layout, Span, plain
from regraft.passes.tokens.legality import HIDDEN, hiding_bias
from regraft.passes.tokens.order import after_inputs, move_behind
from regraft.passes.tokens.packing import PackedRebuild, Packing, beside_padding
from regraft.passes.tokens.padding import Padding, padding_of
from regraft.passes.tokens.reduce import refusal
from regraft.passes.tokens.sites import attentions, projected
from regraft.passes.tokens.stages import batch_size
from regraft.passes.tokens.step import Duty, Kind
from regraft.passes.tokens.walk import Walk

aten = torch.ops.aten


@dataclass(frozen=True)
class Unpad(Pass):
    """Compute an encoder with a padding mask on the tokens that are there.

    ``zero_padding``: outputs may hold zeros where tokens are padding; otherwise a program whose outputs hold something
    there is refused. It runs on recognised programs, before linear layers are merged.
    """

    zero_padding: bool = False

    def run(self, program: Program, session: Session) -> int:
        sites = [node for node in attentions(program) if padding_of(node)]
        if not sites:
            session.log.refusals += [refusal(self.name, site, told) for site, told in _padding_in_numbers(program)]
        if not sites or session.fuel.empty:
            return 0
        try:
            start, padding = _begin(sites[0])
            walk = _walk(start, sites[0])
            _check(walk, padding)
            self._rewrite(program, walk, start, padding)
        except Refused as refused:
            session.log.refusals.append(refusal(self.name, sites[0], refused))
            return 0
        log_applied(session, self.name, Exactness.REASSOCIATED, (start.name, padding.tensor.name), (), start)
        DropDeadCode().run(program, session)
        program.graph.lint()
        return 1

    def _rewrite(self, program: Program, walk: Walk, start: fx.Node, padding: Padding) -> None:
        stages = Packing(walk.tokens, 0, start.meta["val"].device)
        rebuild = PackedRebuild(program, walk, stages)
        with rebuild.whole():
            build = rebuild.builder(max(after_inputs(start), padding.tensor).next, start)
            stages.batch = batch_size(build, start, walk.layouts[start])
            steps = walk.steps.values()
            ends = max(step.prefix for step in steps), max(step.suffix for step in steps)
            flat = _there(build, padding, walk.tokens)
            whole = build.call(aten.expand.default, flat, [stages.batch, walk.tokens])
            stages.pack(build, whole, *ends)
            layout = walk.layouts[start]
            rebuild.new[start] = stages.bring(build, start, layout, (0, 1), layout, merge=False)
            rebuild.stage[start] = 1
            for node in list(program.graph.nodes):
                if node in walk.steps:
                    self._check_padding(rebuild, node, padding)
                    rebuild.node(node)

    def _check_padding(self, rebuild: PackedRebuild, node: fx.Node, padding: Padding) -> None:
        """What is put back is zero at the padding: nobody may see another value there."""
        step = rebuild.walk.steps[node]
        if rebuild.writer(step) is not None or step.duty is Duty.SELECT:
            return
        if self.zero_padding and node.op == "output":
            return
        for operand in rebuild.walk.moving(node):
            if rebuild.stage.get(operand, 0) and not padding.vanishes(operand):
                said = step.reason or "tokens are added up"
                raise Refused(f"what {operand.name} holds for padding is read: {said}", node)


def _padding_in_numbers(program: Program) -> list[tuple[fx.Node, Refused]]:
    """The first attention whose bias may hide padding, and why that is not enough; nothing where there is none."""
    for node in attentions(program):
        with contextlib.suppress(Refused):
            if hiding_bias(program, node) is not None:
                said = "numbers that are added to the scores may hide padding, but do not say that a token is not there"
                return [(node, Refused(f"{said}; give the attention a mask of truth values", node))]
    return []


def padding_in(program: Program) -> Padding | None:
    """The padding of the first attention of a recognised program that one tensor tells."""
    return next(filter(None, map(Padding.of, attentions(program))), None)


def _begin(site: fx.Node) -> tuple[fx.Node, Padding]:
    """What the first attention is a projection of, and its padding; its mask is known when the packed part begins."""
    start = projected(arguments(site)["query"])
    if start is not None and is_call(start, (aten.permute.default,)) and start.args[1] == [1, 0, 2]:
        start = start.all_input_nodes[0]  # nn.MultiheadAttention computes with the tokens in front
    padding = Padding.of(site)
    if padding is None or start is None or rank(start) != 3:
        raise Refused("padding is not given as a mask over keys that are projected from the tokens", site)
    move_behind(padding.tensor, start)
    return start, padding


def _there(build: Builder, padding: Padding, tokens: int) -> fx.Node:
    """``[batch or 1, tokens]``, not 0 where a token is there."""
    flat = build.call(aten.reshape.default, padding.tensor, [-1, tokens])
    return build.call(aten.logical_not.default, flat) if padding.inverted else flat


def _walk(start: fx.Node, site: fx.Node) -> Walk:
    """The walk from ``start``, whose tokens lie behind the samples or in front of them, as the attention tells."""
    first, second, width = shape(start)
    behind: Layout = (Batch(first),), (Span(0, second),), *plain([width])
    if not isinstance(second, int):
        raise Refused("the number of tokens is a symbol; capture with a fixed length", start)
    walk = Walk.behind(start, behind, second)
    if site in walk.layouts or not isinstance(first, int) or not size_equal(first, shape(site)[2]):
        return walk
    return Walk.behind(start, ((Span(0, first),), (Batch(second),), *plain([width])), first)


def _check(walk: Walk, padding: Padding) -> None:
    """Every attention on tokens hides the same padding, from its own tokens."""
    for node, step in walk.steps.items():
        if step.duty is not Duty.ATTENTION:
            continue
        given = arguments(node)
        if not all(given[name] in walk.layouts for name in ("query", "key", "value")) or step.layout is None:
            raise Refused("an attention mixes tokens with others", node)
        others = beside_padding(node)
        ends = max(step.prefix for step in walk.steps.values()) or max(step.suffix for step in walk.steps.values())
        if given["mask_fill"] is not None:
            _check_fill(node, given["mask_fill"], others, bool(ends), walk.tokens)
        if Padding.of(node) != padding:
            raise Refused("the attentions have different padding masks", node)
    if not any(step.heavy for step in walk.steps.values() if step.kind is not Kind.BARRIER):
        raise Refused("no work on tokens follows")


def _check_fill(node: fx.Node, fill: float, others: Predicate, ends: bool, tokens: int) -> None:
    """Where hidden scores are numbers, padding has a weight unless each token sees some key. Raises ``Refused``."""
    if fill > HIDDEN:
        raise Refused(f"hidden scores are {fill:g}, so that padding keeps a weight", node)
    if ends and not isinstance(others, Everything):
        raise Refused("a token that may be padding is read, and hidden scores are numbers in windows", node)
    seen = to_dense(others, [], 1, 1, tokens, tokens).expand(-1, -1, tokens, tokens)
    if not bool(seen[0, 0].diagonal().all()):
        raise Refused("a token may see no key that is there, and hidden scores are numbers", node)
