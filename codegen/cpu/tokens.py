"""Lowering operators over tokens: native plans, merges, rows put back and recurrences; the rest runs the definition."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.kernels import TOKENS
from regraft.codegen.cpu.native_operators import (
    log_native,
    merge_native,
    plan_native,
    scan_native,
    unmerge_native,
)
from regraft.ir import ops
from regraft.ir.nodes import arguments, dtype, is_call, rank, shape, size_equal

aten = torch.ops.aten


def lower_plan(context: Context, node: fx.Node) -> Lowered | None:
    """The bipartite matching and greedy max-min natively; a mean over heads in front is taken by the kernel."""
    given = arguments(node)
    keep, matching = given["keep"], given["matching"]
    plain = matching in ("bipartite", "diverse") and given["scores"] is None
    if not plain or not _native_can(given["metric"]) or (keep is not None and dtype(keep) != torch.bool):
        return None
    heads = _heads(given["metric"])
    metric = context.value(heads or given["metric"])
    if heads is None:
        metric = context.call(aten.unsqueeze.default, metric, 1)
    shown = None if keep is None else context.value(keep)
    options = (given[name] for name in ("remove", "prefix", "suffix", "causal"))
    return Lowered(full=context.call(plan_native, metric, shown, *options, matching == "diverse"))


def lower_merge(context: Context, node: fx.Node) -> Lowered | None:
    """Merging by size natively."""
    given = arguments(node)
    if not _native_can(given["x"]):
        return None
    operands = [None if given[name] is None else context.value(given[name]) for name in _MERGED]
    return Lowered(full=context.call(merge_native, *operands))


def lower_log(context: Context, node: fx.Node) -> Lowered | None:
    """The log of sizes, which attention adds to its scores, beside the merge that makes them."""
    source = node.all_input_nodes[0]
    while is_call(source, (aten.slice.Tensor, operator.getitem)):
        source = source.all_input_nodes[0]
    if source.target is not ops.merge_tokens or not _native_can(node.all_input_nodes[0]):
        return None
    return Lowered(full=context.call(log_native, context.value(node.all_input_nodes[0])))


def lower_unmerge(context: Context, node: fx.Node) -> Lowered | None:
    """Rows put back natively."""
    given = arguments(node)
    if not _native_can(given["x"]):
        return None
    return Lowered(full=context.call(unmerge_native, context.value(given["x"]), context.value(given["slots"])))


def lower_scan(context: Context, node: fx.Node) -> Lowered | None:
    """A recurrence natively."""
    operands = [arguments(node)[name] for name in ("decay", "added", "start")]
    fits = size_equal(shape(operands[1])[2], shape(operands[2])[1])
    if not fits or not all(map(_native_can, operands)):
        return None
    return Lowered(full=context.call(scan_native, *map(context.value, operands)))


_MERGED = ("x", "sizes", "kept", "sources", "slots")


def _native_can(x: fx.Node) -> bool:
    return dtype(x) == torch.float32 and not TOKENS.missing()


def _heads(metric: fx.Node) -> fx.Node | None:
    """What a metric is the mean over heads of, ``[batch, heads, tokens, head_dim]``; None where it is none."""
    if not is_call(metric, (aten.mean.dim,)):
        return None
    given: dict[str, Any] = arguments(metric)
    source: fx.Node = given["self"]
    over_heads = rank(source) == 4 and given["dim"] in ([-3], [1]) and not given["keepdim"]
    return source if over_heads and dtype(source) == torch.float32 else None
