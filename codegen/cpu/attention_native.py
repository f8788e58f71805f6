"""Lowering attention to the native kernel, which takes masks apart: what it can skip, what it must add.

The conjuncts of a site's mask become key intervals per row where they are bands, prefixes, chunks or lengths, one row
of numbers a batch where they are padding, and a tensor of the size of the scores only for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from regraft.codegen.cpu.attention_masks import (
    absorbs,
    additive_mask,
    conjunction,
    gets_no_weight,
    is_flag,
    mask_key,
    parsed,
    without_keys,
)
from regraft.codegen.cpu.attention_sdpa import attend_sdpa
from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import attend_native
from regraft.ir.mask import And, Everything, Keys, Predicate, intervals, parse, to_dense
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import concrete, dtype, shape

_LARGEST_SAMPLE = 1 << 26  # scores; a larger site is not measured: reading no keys in vain decides there


@dataclass(frozen=True)
class AttentionShape:
    """What the choice of a kernel for an attention site depends on; ``mask`` is the predicate's text."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    keys: int
    head_dim: int
    value_dim: int
    mask: str
    has_bias: bool
    dtype: torch.dtype

    def kernels(self) -> tuple[str, ...]:
        """Kernels that can run such a site here."""
        return ("sdpa", "native") if self.dtype == torch.float32 and not NATIVE.missing() else ("sdpa",)


def measurable(given: dict[str, Any]) -> bool:
    """Whether a site can be tried out: its sizes do not depend on data, and its scores are not too many."""
    tensors = [given[name].meta["val"] for name in ("query", "key", "value")]
    if any(free_unbacked_symbols(tensor) for tensor in tensors):
        return False
    form = shape_of(given)
    return form.batch * form.heads * form.length * form.keys <= _LARGEST_SAMPLE


def shape_of(given: dict[str, Any]) -> AttentionShape:
    """The shape of a site; symbolic sizes are those of the example."""
    query, key, value = ([concrete(size) for size in shape(given[name])] for name in ("query", "key", "value"))
    return AttentionShape(
        batch=query[0],
        heads=query[1],
        kv_heads=key[1],
        length=query[2],
        keys=key[2],
        head_dim=query[3],
        value_dim=value[3],
        mask=given["mask"],
        has_bias=given["bias"] is not None or given["slopes"] is not None,
        dtype=dtype(given["query"]),
    )


def native_can(given: dict[str, Any]) -> bool:
    """Whether the native kernel can express a site: fp32, no mask value that keeps some weight or that meets a bias
    and does not absorb it."""
    tensors = [given[name] for name in ("query", "key", "value", "bias", "slopes", "sinks")]
    if any(dtype(tensor) != torch.float32 for tensor in tensors if tensor is not None):
        return False
    fill = given["mask_fill"]
    if fill is not None and not (gets_no_weight(fill) if given["bias"] is None else absorbs(fill)):
        return False
    return not NATIVE.missing()


def lower_native(context: Context, given: dict[str, Any]) -> fx.Node:
    """Emit one site."""
    parts = _take_apart(given)
    operands = [context.value(given[name]) for name in ("query", "key", "value")]
    tables = [None if given[name] is None else context.value(given[name]) for name in ("slopes", "sinks")]
    mask = _mask_node(context, given, parts, operands)
    seen = _interval_node(context, given, parts, operands)
    empty = given["empty_rows"] if given["mask_fill"] is None else "mean"
    return context.call(attend_native, *operands, mask, *tables, given["scale"], given["softcap"], seen, empty)


@dataclass(frozen=True)
class _Parts:
    """A mask as the kernel takes it: predicates of key intervals, of padding, and the rest."""

    intervals: Predicate
    keys: Predicate
    rest: Predicate


def _take_apart(given: dict[str, Any]) -> _Parts:
    predicate = parse(given["mask"])
    if given["bias"] is not None and given["mask_fill"] is not None:
        return _Parts(Everything(), Everything(), predicate)  # the number takes the bias's place, and may take weight
    conjuncts = predicate.operands if isinstance(predicate, And) else (predicate,)
    seen: list[Predicate] = []
    keys: list[Predicate] = []
    rest: list[Predicate] = []
    for part in conjuncts:
        if isinstance(part, Keys):
            keys.append(part)
        elif _is_interval(part):
            seen.append(part)
        else:
            rest.append(part)
    if rest or given["bias"] is not None:  # there is a tensor anyway: one is enough
        rest, keys = rest + keys, []
    return _Parts(conjunction(seen), conjunction(keys), conjunction(rest))


def _is_interval(part: Predicate) -> bool:
    """Whether ``intervals`` can take a conjunct: found out on small stand-ins for its tensors."""
    stand_ins = [torch.zeros(1, dtype=torch.int64)] * (max(tensors_of(part), default=-1) + 1)
    return intervals(part, 1, 1, stand_ins) is not None


def _mask_node(context: Context, given: dict[str, Any], parts: _Parts, operands: list[fx.Node]) -> fx.Node | None:
    """What is added to the scores, None for nothing; sites with equal masks share it."""
    tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
    query, key, _ = operands
    if not isinstance(parts.rest, Everything) or given["bias"] is not None:
        bias = None if given["bias"] is None else context.value(given["bias"])
        fill = -math.inf if given["mask_fill"] is None or bias is None else given["mask_fill"]
        text = str(parts.rest)
        node: fx.Node = context.shared(
            ("native mask", text, mask_key(given)),
            lambda: context.call(score_mask, text, tensors, bias, query, key, fill),
        )
        return node
    if isinstance(parts.keys, Everything):
        return None
    text = str(parts.keys)
    found: fx.Node = context.shared(
        ("native keys", text, mask_key(given)), lambda: context.call(padding_mask, text, tensors, query, key)
    )
    return found


def score_mask(
    text: str, tensors: list[Tensor], bias: Tensor | None, query: Tensor, key: Tensor, fill: float
) -> Tensor:
    """An additive mask of the size of the scores: the bias, and ``fill`` where the predicate does not hold."""
    return additive_mask(text, tensors, bias, None, query, key.shape[2], fill)


def padding_mask(text: str, tensors: list[Tensor], query: Tensor, key: Tensor) -> Tensor | None:
    """``[batch, 1, 1, keys]``: minus infinity at padded keys; None in a batch without any."""
    seen = to_dense(parsed(text), tensors, query.shape[0], 1, 1, key.shape[2])
    return None if bool(seen.all()) else torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def _interval_node(context: Context, given: dict[str, Any], parts: _Parts, operands: list[fx.Node]) -> fx.Node | None:
    """``[2, batch or 1, length]``: made now where nothing is unknown, else in each call, once for equal masks."""
    if isinstance(parts.intervals, Everything):
        return None
    text = str(parts.intervals)
    length, keys = shape(given["query"])[2], shape(given["key"])[2]
    if not tensors_of(parts.intervals) and isinstance(length, int) and isinstance(keys, int):
        table = context.shared(("intervals", text, length, keys), lambda: interval_table(text, [], length, keys))
        return context.bind(table, "intervals")
    tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
    node: fx.Node = context.shared(
        ("interval call", text, mask_key(given)),
        lambda: context.call(intervals_of, text, tensors, operands[0], operands[1]),
    )
    return node


def intervals_of(text: str, tensors: list[Tensor], query: Tensor, key: Tensor) -> Tensor:
    """The interval table of a call."""
    return interval_table(text, tensors, query.shape[2], key.shape[2])


def interval_table(text: str, tensors: list[Tensor], length: int, keys: int) -> Tensor:
    """Where the keys that each row sees start and end: ``[2, batch or 1, length]``, int64."""
    found = intervals(parsed(text), length, keys, tensors)
    assert found is not None
    return torch.stack(torch.broadcast_tensors(*found)).contiguous()


def sample_runs(given: dict[str, Any], form: AttentionShape) -> dict[str, Callable[[], Any]]:
    """Both kernels on random operands that lie in memory as a projection leaves them, and a mask of the site's kind:
    whatever depends on tensors lets everything through."""
    query = torch.randn(form.batch, form.length, form.heads, form.head_dim).transpose(1, 2)
    key = torch.randn(form.batch, form.keys, form.kv_heads, form.head_dim).transpose(1, 2)
    value = torch.randn(form.batch, form.keys, form.kv_heads, form.value_dim).transpose(1, 2)
    predicate = parse(form.mask)
    known = without_keys(predicate) or predicate
    dense: Tensor | None = None
    if form.has_bias or tensors_of(known):
        known, dense = Everything(), torch.zeros(1, 1, form.length, form.keys)
    causal = is_flag(known, form.length, form.keys) == "causal"
    mask, table = dense, None
    if not isinstance(known, Everything):
        if _is_interval(known):
            table = interval_table(str(known), [], form.length, form.keys)
        if not causal or table is None:
            mask = additive_mask(str(known), [], None, None, query, form.keys, -math.inf)
    scale, grouped = given["scale"], form.heads != form.kv_heads
    added = dense if table is not None else mask
    return {
        "sdpa": lambda: attend_sdpa(query, key, value, mask, causal, scale, grouped),
        "native": lambda: attend_native(query, key, value, added, None, None, scale, 0.0, table, "nan"),
    }
