"""Writing the nodes of a walk for fewer tokens: one function for each duty.

Old nodes stay until all is done; ``Rebuild.new`` maps them to what takes their place, ``Rebuild.settled`` those whose
value has its old shape, so that readers outside the walk can be given the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.capture_error import first_line
from regraft.ir.nodes import Builder, arguments, dtype, is_call, is_tensor, shape
from regraft.ir.program import Program
from regraft.ir.verify import check_shapes
from regraft.passes.refused import Refused
from regraft.passes.tokens import layout as axis
from regraft.passes.tokens.attention_rebuild import rebuild_attention
from regraft.passes.tokens.layout import Layout
from regraft.passes.tokens.stages import Stages
from regraft.passes.tokens.step import Duty, Step
from regraft.passes.tokens.walk import Walk

aten = torch.ops.aten
#: Builds the node that takes the place of an old one at a stage.
Writer = Callable[["Rebuild", Builder, fx.Node, Step, int], fx.Node]


@dataclass
class Rebuild:
    """Rebuilds the nodes of ``walk``. ``stage`` says at which stage the value of a node is now."""

    program: Program
    walk: Walk
    stages: Stages
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stage: dict[fx.Node, int] = field(default_factory=dict)
    settled: dict[fx.Node, fx.Node] = field(default_factory=dict)
    restored_inputs: list[tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=list)
    builders: list[Builder] = field(default_factory=list)

    def builder(self, before: fx.Node, source: fx.Node) -> Builder:
        """Builds nodes in front of ``before`` that carry the place in the user's code of ``source``."""

        def stamp() -> dict[str, Any]:
            kept = {key: source.meta.get(key) for key in ("stack_trace", "nn_module_stack")}
            return {**kept, "provenance": (*source.meta.get("provenance", ()), f"reduce-tokens({source.name})")}

        build = Builder(self.program.graph, before, self.program.fake_mode, stamp)
        self.builders.append(build)
        return build

    @property
    def made(self) -> list[fx.Node]:
        """All new nodes, in the order they were made."""
        return [node for build in self.builders for node in build.made]

    def node(self, old: fx.Node) -> None:
        """Write one node of the walk anew, where fewer tokens reach it. Raises ``Refused``."""
        step = self.walk.steps[old]
        stage = max((self.stage.get(source, 0) for source in self.walk.moving(old)), default=0)
        if stage == 0:
            return
        build = self.builder(old, old)
        writer = self.writer(step)
        if writer is None:
            self._unmerge(build, old)
            return
        try:
            made = writer(self, build, old, step, stage)
        except Refused:
            raise
        except Exception as error:  # an operator's fake kernel may ask for a size that only the data tell
            said = first_line(error)
            raise Refused(f"{old.target} cannot be written for another number of tokens ({said})", old) from error
        if step.layout is None:
            self.settled[old] = made
        else:
            self.new[old], self.stage[old] = made, stage

    def writer(self, step: Step) -> Writer | None:
        """What writes such a node; None for one in front of which every token is put back."""
        return _WRITERS.get(step.duty)

    def value(self, node: fx.Node) -> fx.Node:
        """What stands for an operand now."""
        return self.new.get(node) or self.settled.get(node) or node

    def at(self, build: Builder, operand: fx.Node, stage: int, target: Layout, merge: bool) -> fx.Node:
        """An operand that is broadcast against ``target``, at ``stage``."""
        if not is_tensor(operand):
            return self.value(operand)
        layout = self.walk.of(operand)
        if layout is None:
            layout = axis.like(shape(operand), target)
        stages = self.stage.get(operand, 0), stage
        return self.stages.bring(build, self.value(operand), layout, stages, target, merge)

    def restored(self, build: Builder, operand: fx.Node) -> fx.Node:
        """An operand with every token back."""
        layout = self.walk.of(operand)
        if layout is None:
            return self.value(operand)
        return self.stages.restore(build, self.value(operand), layout, self.stage.get(operand, 0))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is written inside counts as a whole: the rest of the graph reads it at the end, and where something is
        ``Refused``, which goes on to the caller, its nodes and weights are taken back."""
        weights_before = self.program.weight_count()
        try:
            yield
            self._commit()
        except Refused:
            self._take_back()
            for placeholder in self.program.weight_placeholders()[weights_before:]:
                self.program.forget_weight(placeholder)
            raise

    def _commit(self) -> None:
        """Let the rest of the graph read the new nodes. Raises ``Refused`` where one has another shape or type."""
        for old, new in self.settled.items():
            reason = check_shapes(old, new)
            if reason:
                raise Refused(f"rewritten for fewer tokens, the {reason}", old)
        fresh = set(self.made)
        for reader, old, new in self.restored_inputs:
            reader.replace_input_with(old, new)
        for old, new in self.settled.items():
            old.replace_all_uses_with(new, lambda user: user not in fresh, propagate_meta=False)

    def _take_back(self) -> None:
        """Erase all that was made."""
        for node in reversed(self.made):
            self.program.graph.erase_node(node)

    def _unmerge(self, build: Builder, old: fx.Node) -> None:
        """Give a barrier its operands back; what comes after it is as it was."""
        for operand in self.walk.moving(old):
            if self.stage.get(operand, 0):
                self.restored_inputs.append((old, operand, self.restored(build, operand)))


def same(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """The same call; what it reads besides is brought to the stage."""
    target = step.layout or next(layout for layout in map(rebuild.walk.of, old.all_input_nodes) if layout)
    tables = {arguments(old)[name] for name in ("cos", "sin")} if is_call(old, (ops.rope,)) else set()

    def operand(node: fx.Node) -> fx.Node:
        if node not in rebuild.walk.layouts and not _broadcasts(old):
            return node
        return rebuild.at(build, node, stage, target, merge=node not in tables)

    args, kwargs = fx.map_arg((old.args, old.kwargs), operand)
    return build.call(old.target, *args, **kwargs)  # type: ignore[arg-type]


def _broadcasts(node: fx.Node) -> bool:
    """Whether operands that hold no tokens of the walk are spread over them: not so for weights."""
    return not is_call(node, _WEIGHTED)


_WEIGHTED = frozenset(
    (aten.linear.default, ops.linear, aten.matmul.default, aten.layer_norm.default, ops.rms_norm,
     aten.rms_norm.default, aten.batch_norm.default, ops.moe)
)  # fmt: skip


def resize(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """A reshape or expansion to the sizes that are left."""
    assert step.layout is not None
    source = rebuild.value(old.all_input_nodes[0])
    return build.call(old.target, source, rebuild.stages.counts(stage).shape(step.layout))  # type: ignore[arg-type]


def _mean(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """``sum(s x) / sum(s)``."""
    source = old.all_input_nodes[0]
    layout = rebuild.walk.layouts[source]
    span = axis.span_of(layout)
    assert span is not None
    weights = rebuild.stages.weights(build, stage, span)
    if weights is None:
        return build.call(old.target, rebuild.value(source), *old.args[1:], **old.kwargs)  # type: ignore[arg-type]
    weights = _as_summed(build, old, weights)
    share = build.call(aten.div.Tensor, weights, build.call(aten.sum.dim_IntList, weights, [-1], True))
    return _weighted(rebuild, build, old, share, layout, stage)


def _sum(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """``sum(s x)``."""
    source = old.all_input_nodes[0]
    layout = rebuild.walk.layouts[source]
    span = axis.span_of(layout)
    assert span is not None
    weights = rebuild.stages.weights(build, stage, span)
    if weights is None:
        return build.call(old.target, rebuild.value(source), *old.args[1:], **old.kwargs)  # type: ignore[arg-type]
    return _weighted(rebuild, build, old, _as_summed(build, old, weights), layout, stage)


def _as_summed(build: Builder, old: fx.Node, weights: fx.Node) -> fx.Node:
    """Sizes in the type that a reduction adds in, where fp32 would round what it adds: in fp64 and whole numbers."""
    kind = torch.promote_types(dtype(old.all_input_nodes[0]), dtype(old))
    exact = kind == torch.float64 or not (kind.is_floating_point or kind.is_complex)
    return build.call(aten.to.dtype, weights, kind) if exact else weights


def _weighted(rebuild: Rebuild, build: Builder, old: fx.Node, weights: fx.Node, layout: Layout, stage: int) -> fx.Node:
    given = arguments(old)
    counts = rebuild.stages.counts(stage)
    sizes = [
        size if not axis.is_plain(factors) else 1 for factors, size in zip(layout, counts.shape(layout), strict=True)
    ]
    held = [factor for factors in layout for factor in factors if isinstance(factor, axis.Batch | axis.Span)]
    if isinstance(held[0], axis.Span) and len(held) > 1:  # the tokens lie in front of the samples
        weights = build.call(aten.permute.default, weights, [1, 0])
    spread = build.call(aten.reshape.default, weights, sizes)
    product = build.call(aten.mul.Tensor, rebuild.value(given["self"]), spread)
    total = build.call(aten.sum.dim_IntList, product, given["dim"], given["keepdim"])
    return total if dtype(total) == dtype(old) else build.call(aten.to.dtype, total, dtype(old))


def _select(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """A place counted from the end moves with it."""
    source, dim, place = (arguments(old)[name] for name in ("self", "dim", "index"))
    if step.suffix:
        place -= rebuild.stages.counts(stage).removed
    return build.call(aten.select.int, rebuild.value(source), dim, place)


def _slice(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """As ``_select``, for both bounds; a slice inside one end moves as a whole."""
    given = arguments(old)
    source, dim = given["self"], given["dim"]
    span = axis.span_of(rebuild.walk.layouts[source])
    assert span is not None
    start, stop, _ = slice(given["start"], given["end"]).indices(span.size)
    removed = rebuild.stages.counts(stage).removed
    if step.layout is not None:
        stop -= removed
    elif step.suffix:
        start, stop = start - removed, stop - removed
    return build.call(aten.slice.Tensor, rebuild.value(source), dim, start, stop)


def _ends(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    """What was cut off is as it was: protected tokens never change places."""
    given = arguments(old)
    return build.call(old.target, [rebuild.value(part) for part in given["tensors"]], given["dim"])  # type: ignore[arg-type]


def _attention(rebuild: Rebuild, build: Builder, old: fx.Node, step: Step, stage: int) -> fx.Node:
    return rebuild_attention(rebuild, build, old, stage)


_WRITERS: dict[Duty, Writer] = {
    Duty.SAME: same,
    Duty.RESIZE: resize,
    Duty.ATTENTION: _attention,
    Duty.MEAN: _mean,
    Duty.SUM: _sum,
    Duty.SELECT: _select,
    Duty.SLICE: _slice,
    Duty.ENDS: _ends,
}
