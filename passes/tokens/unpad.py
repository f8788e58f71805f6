"""Unpadding: between the embedding and the output of an encoder, a padded batch is computed packed.

Exact: a token that is there gets what it got. What was computed for padding is not computed at all; a program that
reads it is refused, unless zeros will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.mask import Everything, Keys
from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape, sizes_equal
from regraft.ir.pointwise import is_cast
from regraft.ir.program import Program
from regraft.passes.applied import log_applied
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Batch, Span, plain
from regraft.passes.tokens.legality import padding_of
from regraft.passes.tokens.packing import PackedRebuild, Packing, beside_padding
from regraft.passes.tokens.reduce import refusal
from regraft.passes.tokens.sites import attentions, projected
from regraft.passes.tokens.stages import batch_size
from regraft.passes.tokens.step import Duty, Kind
from regraft.passes.tokens.walk import Walk

aten = torch.ops.aten
_MOVES = (aten.unsqueeze.default, aten.expand.default, aten.permute.default, aten.reshape.default)


@dataclass(frozen=True)
class Unpad(Pass):
    """Compute an encoder with a padding mask on the tokens that are there.

    ``zero_padding``: outputs may hold zeros where tokens are padding; otherwise a program whose outputs hold something
    there is refused. It runs on recognised programs, before linear layers are merged.
    """

    zero_padding: bool = False

    def run(self, program: Program, session: Session) -> int:
        sites = [node for node in attentions(program) if padding_of(node) is not None]
        if not sites or session.fuel.empty:
            return 0
        try:
            start, mask = _begin(sites[0])
            walk = _walk(program, start)
            _check(walk, mask)
            self._rewrite(program, walk, start, mask)
        except Refused as refused:
            session.log.refusals.append(refusal(self.name, sites[0], refused))
            return 0
        log_applied(session, self.name, Exactness.REASSOCIATED, (start.name, mask.name), (), start)
        DropDeadCode().run(program, session)
        program.graph.lint()
        return 1

    def _rewrite(self, program: Program, walk: Walk, start: fx.Node, mask: fx.Node) -> None:
        stages = Packing(walk.tokens, 0, start.meta["val"].device)
        rebuild = PackedRebuild(program, walk, stages)
        with rebuild.whole():
            build = rebuild.builder(max(_after_inputs(start), mask).next, start)
            stages.batch = batch_size(build, start, walk.layouts[start])
            steps = walk.steps.values()
            ends = max(step.prefix for step in steps), max(step.suffix for step in steps)
            flat = build.call(aten.reshape.default, mask, [-1, walk.tokens])
            whole = build.call(aten.expand.default, flat, [stages.batch, walk.tokens])
            stages.pack(build, whole, *ends)
            layout = walk.layouts[start]
            rebuild.new[start] = stages.bring(build, start, layout, (0, 1), layout, merge=False)
            rebuild.stage[start] = 1
            for node in list(program.graph.nodes):
                if node in walk.steps:
                    self._check_padding(rebuild, node, mask)
                    rebuild.node(node)

    def _check_padding(self, rebuild: PackedRebuild, node: fx.Node, mask: fx.Node) -> None:
        """What is put back is zero at the padding: nobody may see another value there."""
        step = rebuild.walk.steps[node]
        if rebuild.writer(step) is not None or step.duty is Duty.SELECT:
            return
        if self.zero_padding and node.op == "output":
            return
        for operand in rebuild.walk.moving(node):
            if rebuild.stage.get(operand, 0) and not _vanishes(operand, mask):
                said = step.reason or "tokens are added up"
                raise Refused(f"what {operand.name} holds for padding is read: {said}", node)


def padding_mask(program: Program) -> fx.Node | None:
    """The mask, not 0 where a token is there, of the first attention of a recognised program that has one."""
    for site in attentions(program):
        said = padding_of(site)
        if isinstance(said, Keys):
            found: fx.Node = arguments(site)["mask_tensors"][said.tensor]
            return found
    return None


def _begin(site: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What the first attention is a projection of, and its padding mask; the mask is known when the
    packed part begins."""
    start = projected(arguments(site)["query"])
    if start is not None and is_call(start, (aten.permute.default,)) and start.args[1] == [1, 0, 2]:
        start = start.all_input_nodes[0]  # nn.MultiheadAttention computes with the tokens in front
    said = padding_of(site)
    if not isinstance(said, Keys) or start is None or rank(start) != 3:
        raise Refused("padding is not given as a mask over keys that are projected from the tokens", site)
    mask: fx.Node = arguments(site)["mask_tensors"][said.tensor]
    _move_behind(mask, start)
    return start, mask


def _move_behind(node: fx.Node, start: fx.Node) -> None:
    """Move what ``node`` needs, and ``node``, right behind ``start``, on which it does not depend."""
    place = _after_inputs(start)
    pending, needed = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        if current is start:
            raise Refused("the padding mask is computed from the tokens", node)
        if current not in needed and current > place:
            needed.add(current)
            pending += current.all_input_nodes
    for current in sorted(needed):
        place.append(current)
        place = current


def _after_inputs(node: fx.Node) -> fx.Node:
    """``node``, or the last input where it is an input: nothing may stand between those."""
    while node.next.op == "placeholder":
        node = node.next
    return node


def _walk(program: Program, start: fx.Node) -> Walk:
    batch, tokens, width = shape(start)
    if not isinstance(tokens, int):
        raise Refused("the number of tokens is a symbol; capture with a fixed length", start)
    return Walk.behind(start, ((Batch(batch),), (Span(0, tokens),), *plain([width])), tokens)


def _check(walk: Walk, mask: fx.Node) -> None:
    """Every attention on tokens hides the same padding, from its own tokens."""
    for node, step in walk.steps.items():
        if step.duty is not Duty.ATTENTION:
            continue
        given = arguments(node)
        if not all(given[name] in walk.layouts for name in ("query", "key", "value")) or step.layout is None:
            raise Refused("an attention mixes tokens with others", node)
        others = beside_padding(node)
        ends = max(step.prefix for step in walk.steps.values()) or max(step.suffix for step in walk.steps.values())
        if ends and given["mask_fill"] is not None and not isinstance(others, Everything):
            raise Refused("a token that may be padding is read, and hidden scores are numbers in windows", node)
        said = padding_of(node)
        if not isinstance(said, Keys) or given["mask_tensors"][said.tensor] is not mask:
            raise Refused("the attentions have different padding masks", node)
    if not any(step.heavy for step in walk.steps.values() if step.kind is not Kind.BARRIER):
        raise Refused("no work on tokens follows")


def _vanishes(node: fx.Node, mask: fx.Node) -> bool:
    """Whether ``node`` is zero wherever the mask is: a product with it, or with what is cast from it."""
    if node is mask:
        return True
    if is_call(node, (aten.mul.Tensor,)):
        return any(
            _vanishes(operand, mask) and _spans(operand, node) for operand in node.all_input_nodes if is_tensor(operand)
        )
    if is_cast(node) or is_call(node, _MOVES) or is_call(node, (aten.ne.Scalar,)):
        if is_call(node, (aten.ne.Scalar,)) and node.args[1] != 0:
            return False
        return _vanishes(node.all_input_nodes[0], mask)
    return False


def _spans(operand: fx.Node, product: fx.Node) -> bool:
    """Whether a factor has the batch and the tokens of the product, in front."""
    return rank(operand) == rank(product) and sizes_equal(shape(operand)[:2], shape(product)[:2])
