"""A padded batch and its packed form as two stages: ``[batch, length]`` and ``[1, tokens there]``."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.mask import And, Everything, Predicate
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import Builder, arguments
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Batch, Factor, Layout, Span, batch_of, span_dim, span_of
from regraft.passes.tokens.padding import conjuncts, padding_of
from regraft.passes.tokens.rebuild import Rebuild, Writer, resize, same
from regraft.passes.tokens.rows import Counts, from_rows, to_rows, with_batch
from regraft.passes.tokens.stages import Stages
from regraft.passes.tokens.step import Duty, Step

aten = torch.ops.aten


@dataclass(frozen=True)
class PackedCounts(Counts):
    """Sizes of packed tensors: one sample, and as many tokens as are there, which a reshape finds out."""

    def of(self, factor: Factor) -> Any:
        """-1 for the tokens."""
        return 1 if isinstance(factor, Batch) else -1 if isinstance(factor, Span) else factor

    def shape(self, layout: Layout) -> list[Any]:
        """The shape as an argument of a reshape."""
        held = [any(isinstance(factor, Span) for factor in factors) for factors in layout]
        sizes = Counts(1, self.tokens).shape(layout)
        return [-1 if tokens else size for tokens, size in zip(held, sizes, strict=True)]


@dataclass
class Packing(Stages):
    """Stage 0 is padded, stage 1 packed. ``parts`` are the results of ``regraft::pack_tokens``."""

    parts: list[fx.Node] = field(default_factory=list)

    def pack(self, build: Builder, mask: fx.Node, prefix: int, suffix: int) -> None:
        """Find out which tokens are there."""
        call = build.call(ops.pack_tokens, mask, prefix, suffix)
        self.parts = [build.call(operator.getitem, call, place) for place in range(4)]

    def counts(self, stage: int) -> Counts:
        """The sizes of a tensor at ``stage``."""
        return PackedCounts(1, self.tokens) if stage else Counts(self.batch, self.tokens)

    def bring(
        self, build: Builder, node: fx.Node, layout: Layout, stages: tuple[int, int], target: Layout, merge: bool
    ) -> fx.Node:
        """``node`` packed, for use beside a packed value of layout ``target``."""
        span = span_of(layout)
        if stages[0] == stages[1] or (span is None and batch_of(layout) is None):
            return node
        if span is None:
            node, layout = self._of_each_token(build, node, layout, target)
            span = span_of(layout)
        if span != Span(0, self.tokens):
            raise Refused("a part of the sequence meets packed tokens", node)

        def make() -> fx.Node:
            full = with_batch(layout, target)
            rows = to_rows(build, node, layout, self.counts(0))
            flat = build.call(aten.reshape.default, rows, [1, -1, rows.meta["val"].shape[2]])
            packed = build.call(ops.unmerge_tokens, flat, self.parts[0])
            return from_rows(build, packed, full, self.counts(1))

        return self._once(("pack", node, layout, target), make)

    def _of_each_token(self, build: Builder, node: fx.Node, layout: Layout, target: Layout) -> tuple[fx.Node, Layout]:
        """What belongs to a sample, repeated for its tokens: packed, tokens of all samples lie in one row."""
        place = span_dim(target)
        assert place is not None
        layout = ((),) * (len(target) - len(layout)) + layout
        if place == -1:
            layout = (*layout[:-1], target[-1])
        else:
            layout = (*layout[:place], target[place], *layout[place + 1 :])
        sizes = self.counts(0).shape(layout)
        return self._once(("each", node, layout), lambda: build.call(aten.expand.default, node, sizes)), layout

    def restore(self, build: Builder, node: fx.Node, layout: Layout, stage: int) -> fx.Node:
        """``node`` padded again, with zeros."""

        def make() -> fx.Node:
            flat = build.call(ops.unmerge_tokens, to_rows(build, node, layout, self.counts(1)), self.parts[1])
            rows = build.call(aten.reshape.default, flat, [self.batch, self.tokens, flat.meta["val"].shape[2]])
            return from_rows(build, rows, layout, self.counts(0))

        return self._once(("unpack", node, layout), make)


def attention(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """Attention inside each sample."""
    given = arguments(old)
    operands = [rebuild.value(given[name]) for name in ("query", "key", "value")]
    stages = rebuild.stages
    assert isinstance(stages, Packing)
    index, _, offsets, present = stages.parts
    predicate = beside_padding(old)
    options = {name: given[name] for name in ("scale", "mask_fill", "empty_rows", "softcap")}
    mask = "all" if isinstance(predicate, Everything) else str(predicate)
    return build.call(
        ops.attention_packed, *operands, index, offsets, present, length=stages.tokens, mask=mask, **options
    )


def beside_padding(node: fx.Node) -> Predicate:
    """The mask of an attention but for the padding. Raises ``Refused`` where it is not padding and places alone."""
    given = arguments(node)
    parts = conjuncts(node)
    padding = padding_of(node)
    others = [part for part in parts if part not in padding]
    if len(parts) - len(others) != 1 or any(tensors_of(part) for part in others):
        raise Refused("the mask of the attention is not padding and places alone", node)
    if any(given[name] is not None for name in ("bias", "slopes", "sinks")):
        raise Refused("the attention has a bias, slopes or sinks, which are not packed", node)
    return Everything() if not others else others[0] if len(others) == 1 else And(tuple(others))


class PackedRebuild(Rebuild):
    """Writes the nodes of a walk for packed tokens; whatever adds up or picks tokens reads them padded again."""

    writers: ClassVar[dict[Duty, Writer]] = {Duty.SAME: same, Duty.RESIZE: resize, Duty.ATTENTION: attention}

    def writer(self, step: Step) -> Writer | None:
        """None for a node in front of which tokens are put back."""
        return self.writers.get(step.duty) if step.layout is not None else None
