"""The tokens between two reductions, and bringing values from one stage to another.

Stage 0 has all tokens; each reduction begins the next one. What meets values of a later stage is brought there: by
the same merges where it is an activation, by reading it at the tokens that stay where it belongs to a position (rotary
tables, masks). Whatever is made is remembered, so that layers share it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import Builder, dtype, size_equal, tensor_value
from regraft.passes.tokens.layout import Batch, Layout, Span, span_of
from regraft.passes.tokens.rows import Counts, from_rows, to_rows, with_batch

aten = torch.ops.aten


@dataclass(frozen=True)
class Reduction:
    """One plan and the sizes that it merged by: ``kept``, ``sources``, ``slots`` as of ``regraft::plan_merge``;
    ``sizes`` ``[batch, tokens]`` of the tokens before, None where all are one."""

    kept: fx.Node
    sources: fx.Node
    slots: fx.Node
    sizes: fx.Node | None
    removed: int


@dataclass
class Stages:
    """All stages of one program. ``batch`` is the batch size, an int or the node that computes it; ``sizes[stage]``
    the sizes of its tokens, None where all are one."""

    tokens: int
    batch: Any
    device: torch.device
    reductions: list[Reduction] = field(default_factory=list)
    sizes: list[fx.Node | None] = field(default_factory=lambda: [None])
    _made: dict[Any, fx.Node] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The current stage."""
        return len(self.reductions)

    def counts(self, stage: int) -> Counts:
        """The sizes of a tensor at ``stage``."""
        return Counts(self.batch, self.tokens, sum(reduction.removed for reduction in self.reductions[:stage]))

    def left(self, stage: int) -> int:
        """How many tokens there are at ``stage``."""
        return self.tokens - self.counts(stage).removed

    def reduce(self, build: Builder, plan: fx.Node, x: fx.Node, removed: int, weigh: bool) -> fx.Node:
        """Begin a stage: ``x`` ``[batch, tokens, width]`` reduced by ``plan``. Not ``weigh``: sizes stay one."""
        kept, sources, slots = (build.call(operator.getitem, plan, place) for place in range(3))
        sizes = self.sizes[-1]
        merged = build.call(ops.merge_tokens, x, sizes, kept, sources, slots)
        self.reductions.append(Reduction(kept, sources, slots, sizes, removed))
        self.sizes.append(build.call(operator.getitem, merged, 1) if weigh else None)
        return build.call(operator.getitem, merged, 0)

    def bring(
        self, build: Builder, node: fx.Node, layout: Layout, stages: tuple[int, int], target: Layout, merge: bool
    ) -> fx.Node:
        """``node`` of the first stage at the second, for use beside a value of layout ``target``. ``merge``: by the
        same merges, else as it is at the tokens that stay."""
        start, end = stages
        span = span_of(layout)
        if start == end or span is None:
            return node
        merge = merge and dtype(node).is_floating_point

        def make() -> fx.Node:
            full = with_batch(layout, target)
            rows = self._whole(build, to_rows(build, node, layout, self.counts(start)), span, start)
            if merge:
                for reduction in self.reductions[start:end]:
                    parts = reduction.sizes, reduction.kept, reduction.sources, reduction.slots
                    merged = build.call(ops.merge_tokens, rows, *parts)
                    rows = build.call(operator.getitem, merged, 0)
            else:
                rows = build.call(ops.unmerge_tokens, rows, self.stayed(build, start, end))
            rows = self._part(build, rows, span, end)
            return from_rows(build, rows, full, self.counts(end))

        return self._once(("bring", node, layout, stages, target, merge), make)

    def restore(self, build: Builder, node: fx.Node, layout: Layout, stage: int) -> fx.Node:
        """``node`` of ``stage`` with every token back."""
        span = span_of(layout)
        if stage == 0 or span is None:
            return node

        def make() -> fx.Node:
            rows = to_rows(build, node, layout, self.counts(stage))
            slots = self.found(build, stage)
            if span != Span(0, self.tokens):
                slots = build.call(aten.slice.Tensor, slots, -1, span.start, span.stop)
                slots = build.call(aten.sub.Tensor, slots, span.start) if span.start else slots
            return from_rows(build, build.call(ops.unmerge_tokens, rows, slots), layout, self.counts(0))

        return self._once(("restore", node, layout, stage), make)

    def stayed(self, build: Builder, start: int, end: int) -> fx.Node:
        """``[batch, tokens]`` of stage ``end``: the place at stage ``start`` of the token that each stands for."""

        def make() -> fx.Node:
            kept = self.reductions[end - 1].kept
            if end - 1 == start:
                return kept
            return build.call(aten.gather.default, self.stayed(build, start, end - 1), 1, kept)

        return self._once(("stayed", start, end), make)

    def found(self, build: Builder, stage: int) -> fx.Node:
        """``[batch, tokens]`` of stage 0: the slot at ``stage`` that each token is found in, -1 for none."""

        def make() -> fx.Node:
            slots = self.reductions[stage - 1].slots
            if stage == 1:
                return slots
            before = self.found(build, stage - 1)
            looked_up = build.call(aten.gather.default, slots, 1, build.call(aten.clamp.default, before, 0))
            gone = build.call(aten.lt.Scalar, before, 0)
            return build.call(aten.where.ScalarSelf, gone, -1, looked_up)

        return self._once(("found", stage), make)

    def positions(self, build: Builder, stage: int, span: Span) -> fx.Node:
        """``[batch or 1, tokens]``: the place that each token of the span had at first."""

        def make() -> fx.Node:
            if stage == 0:
                places = build.call(aten.arange.start, span.start, span.stop, device=self.device, pin_memory=False)
                return build.call(aten.reshape.default, places, [1, span.size])
            return self._part(build, self.stayed(build, 0, stage), span, stage)

        return self._once(("positions", stage, span), make)

    def weights(self, build: Builder, stage: int, span: Span) -> fx.Node | None:
        """``[batch, tokens]``: the sizes of the tokens of a span in fp32, None where all are one."""
        sizes = self.sizes[stage]
        if sizes is None:
            return None
        return self._once(("weights", stage, span), lambda: self._part(build, sizes, span, stage))

    def log_weights(self, build: Builder, stage: int, span: Span, wanted: torch.dtype) -> fx.Node | None:
        """The log of ``weights`` in the type ``wanted``."""
        weights = self.weights(build, stage, span)
        if weights is None:
            return None

        def make() -> fx.Node:
            wide = weights if dtype(weights) == wanted else build.call(aten.to.dtype, weights, wanted)
            return build.call(aten.log.default, wide)

        return self._once(("log", stage, span, wanted), make)

    def _part(self, build: Builder, rows: fx.Node, span: Span, stage: int) -> fx.Node:
        """The tokens of a span among all at ``stage``, along dim 1; its ends are protected."""
        if span == Span(0, self.tokens):
            return rows
        dim = 1 - tensor_value(rows).dim()
        return build.call(aten.slice.Tensor, rows, dim, span.start, self.left(stage) - (self.tokens - span.stop))

    def _whole(self, build: Builder, rows: fx.Node, span: Span, stage: int) -> fx.Node:
        """Rows of a span among rows of all tokens: what lies outside is protected, so its value is never used."""
        ends = span.start, self.tokens - span.stop
        return build.call(aten.pad.default, rows, [0, 0, *ends]) if any(ends) else rows

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        known = _hashable(key)
        if known not in self._made:
            self._made[known] = make()
        return self._made[known]


def _hashable(key: Any) -> Any:
    """A key whose symbolic sizes are named: they cannot be hashed themselves."""
    if isinstance(key, tuple):
        return tuple(map(_hashable, key))
    if isinstance(key, Batch):
        return "batch", _hashable(key.size)
    return str(key) if isinstance(key, torch.SymInt) else key


def batch_size(build: Builder, node: fx.Node, layout: Layout) -> Any:
    """The batch size of a tensor one of whose dims is the batch, as an argument of a call."""
    dim = next(place for place, factors in enumerate(layout) if any(isinstance(factor, Batch) for factor in factors))
    (batch,) = layout[dim]
    assert isinstance(batch, Batch) and size_equal(batch.size, tensor_value(node).shape[dim])
    return build.size(node, dim)
