"""Merge tokens that are provably equal: computed once, counted as often as they come, put back where all are needed.

Exact but for rounding: ``softmax`` over n equal keys is that over one with ``log n`` on its score, and a mean counts it
n times. Unlike a lossy reduction, nothing that the tokens meet is merged on trust: a table, mask or bias is read at the
tokens that stay only where it is proved to be the same for all that stand behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.mask import Everything, parse
from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.program import Program
from regraft.passes.applied import log_applied
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.refused import Refused
from regraft.passes.tokens.attention_rebuild import rebuild_attention
from regraft.passes.tokens.equal_masks import COLUMNS, ROWS, bias_keys, mask_keys
from regraft.passes.tokens.equal_places import EqualPlaces
from regraft.passes.tokens.equal_stages import EqualStages
from regraft.passes.tokens.layout import Batch, Span, plain
from regraft.passes.tokens.legality import hiding_bias
from regraft.passes.tokens.order import after_inputs
from regraft.passes.tokens.rebuild import Rebuild, Writer
from regraft.passes.tokens.reduce import refusal
from regraft.passes.tokens.sites import NORMS, attentions, projected
from regraft.passes.tokens.stages import batch_size
from regraft.passes.tokens.step import Duty, Step
from regraft.passes.tokens.walk import Walk

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeEqualTokens(Pass):
    """Compute tokens that the graph proves to be equal once.

    A sequence is merged in front of the first self-attention that it reaches, and every token is put back in front of
    whatever tells equal tokens apart: positions, masks over places, grids, windows, outputs. A sequence of which no
    attention would run on fewer tokens is refused in the log. It runs on recognised programs, before linear layers are
    merged.
    """

    def run(self, program: Program, session: Session) -> int:
        equal = EqualPlaces(program)
        seen: set[fx.Node] = set()
        made = 0
        while not session.fuel.empty:
            site = next((node for node in attentions(program) if node not in seen), None)
            if site is None:
                break
            seen.add(site)
            try:
                merge = _Merge(program, equal, site)
                rebuild = merge.write()
            except Refused as refused:
                session.log.refusals.append(refusal(self.name, site, refused))
                continue
            seen.update(rebuild.made)
            self._log(session, merge, rebuild)
            DropDeadCode().run(program, session)
            program.drop_unused_weights()
            program.graph.lint()
            equal.survey()
            made += 1
        return made

    def _log(self, session: Session, merge: _Merge, rebuild: _EqualRebuild) -> None:
        log_applied(session, self.name, Exactness.REASSOCIATED, (merge.start.name,), (merge.told,), merge.start)
        for node, refused in rebuild.told_apart.items():
            session.log.refusals.append(refusal(self.name, node, refused))


def _attention(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """Attention whose mask and bias are the same for equal tokens, and where a size counts as so many keys would."""
    given, stages = arguments(old), rebuild.stages
    assert isinstance(stages, EqualStages)
    mask, bias = parse(given["mask"]), given["bias"]
    sides = [dim for dim, name in ((ROWS, "query"), (COLUMNS, "key")) if rebuild.walk.of(given[name]) is not None]
    for dim in sides:
        if not stages.are_alike(mask_keys(stages.equal, old, dim)):
            raise Refused("the mask of the attention tells equal tokens apart", old)
        if bias is not None and not stages.are_alike(bias_keys(stages.equal, bias, dim, stages.tokens)):
            raise Refused("the bias of the attention tells equal tokens apart", old)
    if given["slopes"] is not None:
        raise Refused("the bias of the attention tells tokens apart by their places", old)
    if COLUMNS in sides and given["mask_fill"] is not None and not isinstance(mask, Everything):
        raise Refused("hidden scores are numbers, which the size of a token is not added to", old)
    if COLUMNS in sides and hiding_bias(rebuild.program, old) is not None:
        raise Refused("the bias of the attention is computed from inputs, and sizes may be lost in it", old)
    return rebuild_attention(rebuild, build, old, stage, stages.unproved)


def _select(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """One token, read where its first equal is."""
    source, dim, place = (arguments(old)[name] for name in ("self", "dim", "index"))
    stages = rebuild.stages
    assert isinstance(stages, EqualStages)
    return build.call(aten.select.int, rebuild.value(source), dim, stages.slots[place])


@dataclass
class _EqualRebuild(Rebuild):
    """Puts every token back in front of a node that tells equal tokens apart; ``told_apart`` are those nodes."""

    told_apart: dict[fx.Node, Refused] = field(default_factory=dict)
    writers: ClassVar[dict[Duty, Writer | None]] = {
        Duty.ATTENTION: _attention,
        Duty.SELECT: _select,
        Duty.SLICE: None,
        Duty.ENDS: None,
    }

    def node(self, old: fx.Node) -> None:
        """As for any reduction; a node that cannot be written for fewer tokens is left as it was."""
        try:
            super().node(old)
        except Refused as refused:
            self.told_apart[old] = Refused(refused.reason, refused.node or old)
            self._unmerge(self.builder(old, old), old)

    def writer(self, step: Step) -> Writer | None:
        """None where every token is put back."""
        return self.writers[step.duty] if step.duty in self.writers else super().writer(step)


class _Merge:
    """One sequence: where it is merged, ``start`` ``[batch, tokens, width]``, and what is equal there. Raises
    ``Refused`` where nothing is known to be."""

    def __init__(self, program: Program, equal: EqualPlaces, site: fx.Node) -> None:
        self.program, self.equal = program, equal
        self.start = _start(equal, site)
        batch, tokens, width = shape(self.start)
        if not isinstance(tokens, int):
            raise Refused("the number of tokens is a symbol; capture with a fixed length", self.start)
        labels = equal.of(self.start, -2)
        if labels is None:
            raise _why_none(equal, self.start, tokens)
        self.labels, self.told = labels, f"{tokens - len(set(labels))} of {tokens} tokens"
        self.walk = Walk.behind(self.start, ((Batch(batch),), (Span(0, tokens),), *plain([width])), tokens)

    def write(self) -> _EqualRebuild:
        """Write it. Raises ``Refused``, and changes nothing then."""
        start, layout = self.start, self.walk.layouts[self.start]
        stages = EqualStages(self.walk.tokens, 0, start.meta["val"].device, labels=self.labels, equal=self.equal)
        rebuild = _EqualRebuild(self.program, self.walk, stages)
        with rebuild.whole():
            build = rebuild.builder(after_inputs(start).next, start)
            stages.batch = batch_size(build, start, layout)
            stages.begin(build, self.program)
            rebuild.new[start] = stages.bring(build, start, layout, (0, 1), layout, merge=False)
            rebuild.stage[start] = 1
            for node in list(self.program.graph.nodes):
                if node in self.walk.steps:
                    rebuild.node(node)
            if not any(node.target is ops.attention for node in rebuild.made):
                raise next(iter(rebuild.told_apart.values()), Refused("no attention follows", start))
        return rebuild


def _start(equal: EqualPlaces, site: fx.Node) -> fx.Node:
    """The tokens that an attention is a projection of, in front of a norm where they are equal there too. Raises
    ``Refused``."""
    start = projected(arguments(site)["query"])
    if start is not None and is_call(start, (aten.permute.default,)) and start.args[1] == [1, 0, 2]:
        start = start.all_input_nodes[0]  # nn.MultiheadAttention computes with the tokens in front
    if start is None or rank(start) != 3 or not size_equal(shape(start)[1], shape(site)[2]):
        raise Refused("the tokens are not laid out as batch, tokens and width", start or site)
    while is_call(start, NORMS) and equal.of(start.all_input_nodes[0], -2) == equal.of(start, -2):
        start = start.all_input_nodes[0]
    return start


def _why_none(equal: EqualPlaces, start: fx.Node, tokens: int) -> Refused:
    """Where tokens that were equal were told apart, the nearest first."""

    def repeats(node: fx.Node) -> bool:
        dims = range(-rank(node), 0) if is_tensor(node) else ()
        return any(size_equal(shape(node)[dim], tokens) and equal.of(node, dim) for dim in dims)

    pending, seen = [start], {start}
    for node in pending:
        if node.target not in (ops.attention, ops.unmerge_tokens):
            fresh = [source for source in node.all_input_nodes if source not in seen]
            if any(map(repeats, node.all_input_nodes)):
                return Refused(f"{node.target} tells tokens apart that were equal before it", node)
            seen.update(fresh)
            pending += fresh
    return Refused("no two tokens are known to be equal", start)
