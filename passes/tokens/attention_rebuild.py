"""Attention over fewer tokens: ``softmax(q k + log s) v``, its mask and bias said of the tokens that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.mask import parse
from regraft.ir.nodes import Builder, arguments, dtype, rank, shape
from regraft.passes.tokens.layout import Batch, Layout, Span
from regraft.passes.tokens.masks import Reader, Side

if TYPE_CHECKING:
    from regraft.passes.tokens.rebuild import Rebuild
    from regraft.passes.tokens.stages import Stages

aten = torch.ops.aten
_TARGETS: tuple[str, ...] = ("query", "key", "value")


def rebuild_attention(
    rebuild: Rebuild, build: Builder, old: fx.Node, stage: int, reading: Stages | None = None
) -> fx.Node:
    """The attention node ``old`` at ``stage``; ``reading``: other stages by which mask and bias are read. Raises
    ``Refused``."""
    given = arguments(old)
    layouts = {name: rebuild.walk.of(given[name]) for name in _TARGETS}
    operands = [
        rebuild.at(build, given[name], stage, layout, merge=True) if layout else rebuild.value(given[name])
        for name, layout in layouts.items()
    ]
    rows, columns = (_side(given[name], layouts[name], stage) for name in ("query", "key"))
    held = layouts["query"] or layouts["key"]
    assert held is not None
    reader = Reader(build, reading or rebuild.stages, given["mask_tensors"], held, rows, columns)
    predicate = reader.read(parse(given["mask"]))
    bias, slopes = given["bias"], given["slopes"]
    if bias is not None:
        bias = reader.matrix(bias)
    if slopes is not None and (rows.span is not None or columns.span is not None):
        bias, slopes = _sum(build, bias, _sloped(build, slopes, reader.distance())), None
    if layouts["key"] is not None:
        bias = _sum(build, bias, _log_sizes(rebuild, build, layouts["key"], stage, dtype(given["query"])))
    options = {name: given[name] for name in ("scale", "mask_fill", "empty_rows", "softcap")}
    return build.call(
        ops.attention, *operands, reader.tensors, bias, slopes, given["sinks"], mask=str(predicate), **options
    )


def _side(operand: fx.Node, layout: Layout | None, stage: int) -> Side:
    span = layout[2][0] if layout is not None else None
    return Side(span if isinstance(span, Span) else None, stage if span is not None else 0, shape(operand)[2])


def _sum(build: Builder, left: fx.Node | None, right: fx.Node | None) -> fx.Node | None:
    if left is None or right is None:
        return left if right is None else right
    return build.call(aten.add.Tensor, left, right)


def _log_sizes(rebuild: Rebuild, build: Builder, key: Layout, stage: int, wanted: torch.dtype) -> fx.Node | None:
    """``[batch, 1 or heads, 1, keys]``: the log of the sizes, added to the scores. In fp32: rounded to a narrow type
    it would shift all weights of a token."""
    wide = torch.promote_types(wanted, torch.float32)
    span = key[2][0]
    assert isinstance(span, Span)
    logs = rebuild.stages.log_weights(build, stage, span, wide)
    if logs is None:
        return None
    counts = rebuild.stages.counts(stage)
    sizes: list[Any] = [counts.batch, 1, 1, counts.of(span)]
    if any(len(factors) > 1 for factors in key[:2] if any(isinstance(factor, Batch) for factor in factors)):
        spread = [counts.of(factor) for factors in key[:2] for factor in factors]
        ones = [counts.batch, *[1] * (len(spread) - 1), counts.of(span)]
        whole = build.call(aten.expand.default, build.call(aten.reshape.default, logs, ones), [*spread, ones[-1]])
        sizes = [*counts.shape(key)[:2], 1, counts.of(span)]
        return build.call(aten.reshape.default, whole, sizes)
    return build.call(aten.reshape.default, logs, sizes)


def _sloped(build: Builder, slopes: fx.Node, distance: fx.Node) -> fx.Node:
    """ALiBi, ``slopes * (key - query)``, as a bias."""
    per_head = build.call(aten.reshape.default, slopes, [1, *shape(slopes)[-1:], 1, 1])
    places = distance if rank(distance) == 4 else build.call(aten.unsqueeze.default, distance, -3)
    return build.call(aten.mul.Tensor, per_head, build.call(aten.to.dtype, places, dtype(slopes)))
