"""Lowering attention to the native kernel: which sites it can express, and how they are emitted.

Operands in low precision are widened for it, and its result is narrowed: it computes in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.attention_masks import absorbs, appended, gets_no_weight
from regraft.codegen.cpu.attention_parts import mask_nodes, take_apart, widened
from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import attend_native, lse_native
from regraft.ir.mask import Everything
from regraft.ir.nodes import arguments, dtype

aten = torch.ops.aten


#: Element types of operands that lose nothing in fp32.
NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_can(given: dict[str, Any]) -> bool:
    """Whether the native kernel can express a site: of one type of ``NATIVE_TYPES``, with no mask value that keeps some
    weight or that meets a bias and does not absorb it."""
    kinds = {dtype(given[name]) for name in ("query", "key", "value")}
    added = (given[name] for name in ("bias", "slopes", "sinks"))
    if len(kinds) > 1 or any(kind not in NATIVE_TYPES for kind in kinds):
        return False
    if any(dtype(node) not in NATIVE_TYPES for node in added if node is not None):
        return False
    fill = given["mask_fill"]
    if fill is not None and not (gets_no_weight(fill) if given["bias"] is None else absorbs(fill)):
        return False
    return not NATIVE.missing()


def native_can_map(context: Context, given: dict[str, Any]) -> bool:
    """The same for ``regraft::attention_mapped``. Where something is added, minus infinity must weigh nothing."""
    if not _in_fp32(given, ("query", "key", "value", "bias", "slopes")) or NATIVE.missing():
        return False
    added = given["bias"] is not None or not isinstance(take_apart(context, given).keys, Everything)
    return not added or given["weight"] not in ("gelu", "identity")


def lower_lse(context: Context, node: fx.Node) -> Lowered | None:
    """``regraft::attention_lse`` natively; a number at masked scores counts in the sum: it is left as it is."""
    given = arguments(node)
    if not _in_fp32(given, ("query", "key", "bias", "slopes", "sinks")) or NATIVE.missing():
        return None
    if given["mask_fill"] not in (None, -math.inf):
        return None
    mask = mask_nodes(context, given, take_apart(context, given))
    operands = [context.value(given[name]) for name in ("query", "key")]
    tables = [None if given[name] is None else context.value(given[name]) for name in ("slopes", "sinks")]
    options = given["scale"], given["softcap"], mask.spans, mask.bits
    return Lowered(full=context.call(lse_native, *operands, mask.added, *tables, *options))


def _in_fp32(given: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(dtype(given[name]) == torch.float32 for name in names if given[name] is not None)


def lower_native(context: Context, given: dict[str, Any]) -> fx.Node:
    """Emit one site."""
    empty = given["empty_rows"] if given["mask_fill"] is None else "mean"
    return _emit(context, given, empty)


def lower_native_map(context: Context, given: dict[str, Any]) -> fx.Node:
    """Emit one site of ``regraft::attention_mapped``."""
    return _emit(context, given, "zero", (given["weight"], given["normaliser"], given["constant"]))


def _emit(
    context: Context, given: dict[str, Any], empty: str, weights: tuple[str, str, float] = ("softmax", "sum", 0.0)
) -> fx.Node:
    """A call of the kernel, which joins keys and values of two pieces as it reads them."""
    pieces = appended(given) or (given["key"], None, given["value"], None)
    key, key_more, value, value_more = (None if piece is None else widened(context, piece) for piece in pieces)
    slopes, sinks = (None if given.get(name) is None else widened(context, given[name]) for name in ("slopes", "sinks"))
    mask = mask_nodes(context, given, take_apart(context, given))
    options = given["scale"], given["softcap"], mask.spans, mask.bits, empty, *weights
    operands = widened(context, given["query"]), key, value, mask.added, slopes, sinks
    more = (key_more, value_more) if key_more is not None else ()
    out = context.call(attend_native, *operands, *options, *more)
    kind = dtype(given["query"])
    return out if kind == torch.float32 else context.call(aten._to_copy.default, out, dtype=kind)
