"""Lowering attention to the native kernel, which takes masks apart: what it can skip, what it must add.

The conjuncts of a site's mask become a few spans of keys per row and head where they are bands, prefixes, chunks,
lengths, and unions of them; documents and trees too, when their tensors are at hand. Padding is one row of numbers a
batch, and only the rest is a tensor of the size of the scores.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
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
    fixed_sizes,
    gets_no_weight,
    is_flag,
    mask_key,
    parsed,
    without_keys,
)
from regraft.codegen.cpu.attention_sdpa import attend_sdpa
from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import attend_native, lse_native
from regraft.ir.mask import MOST_SPANS, And, Everything, Keys, Predicate, has_spans, most_spans, parse, spans, to_dense
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import arguments, concrete, dtype, shape, size_equal
from regraft.ir.probe import Pool, Probe, ProbeError, index_like

_LOG = logging.getLogger("regraft")
_LARGEST_CONSTANT = 1 << 26  # elements of a mask that is looked at when a model is lowered
_LARGEST_SAMPLE = 1 << 26  # scores; a larger site is not measured: reading no keys in vain decides there

#: Intervals a row of a part of a mask that is read in every call: meeting more with others costs more than a mask.
_WORTH_MEETING = 4 * MOST_SPANS


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
    if not _in_fp32(given, ("query", "key", "value", "bias", "slopes", "sinks")):
        return False
    fill = given["mask_fill"]
    if fill is not None and not (gets_no_weight(fill) if given["bias"] is None else absorbs(fill)):
        return False
    return not NATIVE.missing()


def native_can_map(context: Context, given: dict[str, Any]) -> bool:
    """The same for ``regraft::attention_mapped``. Of a mask that is a tensor, minus infinity must weigh nothing."""
    if not _in_fp32(given, ("query", "key", "value", "bias", "slopes")) or NATIVE.missing():
        return False
    parts = take_apart(context, given)
    added = given["bias"] is not None or any(
        not isinstance(p, Everything) for p in (parts.runs, parts.keys, parts.rest)
    )
    return not added or given["weight"] not in ("gelu", "identity")


def lower_lse(context: Context, node: fx.Node) -> Lowered | None:
    """``regraft::attention_lse`` natively."""
    given = arguments(node)
    if not _in_fp32(given, ("query", "key")) or NATIVE.missing():
        return None
    query, key = context.value(given["query"]), context.value(given["key"])
    return Lowered(full=context.call(lse_native, query, key, given["scale"], given["softcap"]))


def _in_fp32(given: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(dtype(given[name]) == torch.float32 for name in names if given[name] is not None)


def lower_native(context: Context, given: dict[str, Any]) -> fx.Node:
    """Emit one site."""
    parts = take_apart(context, given)
    operands = [context.value(given[name]) for name in ("query", "key", "value")]
    tables = [None if given[name] is None else context.value(given[name]) for name in ("slopes", "sinks")]
    mask, seen = mask_nodes(context, given, parts)
    empty = given["empty_rows"] if given["mask_fill"] is None else "mean"
    return context.call(attend_native, *operands, mask, *tables, given["scale"], given["softcap"], seen, empty)


def lower_native_map(context: Context, given: dict[str, Any]) -> fx.Node:
    """Emit one site of ``regraft::attention_mapped``."""
    operands = [context.value(given[name]) for name in ("query", "key", "value")]
    slopes = None if given["slopes"] is None else context.value(given["slopes"])
    mask, seen = mask_nodes(context, given, take_apart(context, given))
    options = given["scale"], given["softcap"], seen, "zero", given["weight"], given["normaliser"], given["constant"]
    return context.call(attend_native, *operands, mask, slopes, None, *options)


@dataclass(frozen=True)
class Parts:
    """A mask as the kernel takes it: what is a few spans of keys a row by its form, or by constants that were looked at
    (``known``), what a tensor may make so (packed documents, ancestors in a tree), padding, and the rest."""

    spans: Predicate
    known: Predicate
    runs: Predicate
    keys: Predicate
    rest: Predicate


def take_apart(context: Context, given: dict[str, Any]) -> Parts:
    """The parts of a site's mask."""
    predicate = parse(given["mask"])
    if given["bias"] is not None and given.get("mask_fill") is not None:
        # The number takes the bias's place, and may take weight.
        return Parts(Everything(), Everything(), Everything(), Everything(), predicate)
    conjuncts = predicate.operands if isinstance(predicate, And) else (predicate,)
    constants = {n for n, tensor in enumerate(given["mask_tensors"]) if _is_constant(context, tensor)}
    conditions = [n for n, tensor in enumerate(given["mask_tensors"]) if _is_condition(tensor)]
    seen: list[Predicate] = []
    known: list[Predicate] = []
    runs: list[Predicate] = []
    keys: list[Predicate] = []
    rest: list[Predicate] = []
    for part in conjuncts:
        if isinstance(part, Keys):
            keys.append(part)
        elif most_spans(conjunction([*seen, part]), conditions) <= MOST_SPANS:
            seen.append(part)
        elif tensors_of(part) <= constants and fixed_sizes(given) is not None:
            known.append(part)
        elif has_spans(part, conditions):
            runs.append(part)
        else:
            rest.append(part)
    if known and _known_table(context, given, conjunction(seen), conjunction(known)) is None:
        rest, known = rest + known, []
    if rest or _is_large(given["bias"]):  # there is a tensor anyway: one is enough
        rest, runs, keys = rest + runs + keys, [], []
    return Parts(*map(conjunction, (seen, known, runs, keys, rest)))


def _is_constant(context: Context, tensor: fx.Node) -> bool:
    return context.is_weight(tensor) and math.prod(map(concrete, shape(tensor))) <= _LARGEST_CONSTANT


def _is_condition(tensor: fx.Node) -> bool:
    """Whether a tensor says the same of all keys of a row."""
    return len(shape(tensor)) > 0 and size_equal(shape(tensor)[-1], 1)


def _known_table(context: Context, given: dict[str, Any], seen: Predicate, known: Predicate) -> Tensor | None:
    """The spans of a mask that is known now, constants included; None where they are many, or tensors are unknown."""
    sizes, both = fixed_sizes(given), conjunction([seen, known])
    nodes = given["mask_tensors"]
    if sizes is None or any(not _is_constant(context, nodes[number]) for number in tensors_of(both)):
        return None

    def make() -> Tensor | None:
        tensors = [context.weight(node) if _is_constant(context, node) else torch.zeros(1) for node in nodes]
        return spans(both, *sizes, tensors, dense=True)

    table: Tensor | None = context.shared(("known spans", str(both), tuple(nodes), sizes), make)
    return table


def _is_large(bias: fx.Node | None) -> bool:
    """Whether a bias differs from row to row."""
    return bias is not None and len(shape(bias)) > 1 and not size_equal(shape(bias)[-2], 1)


def mask_nodes(context: Context, given: dict[str, Any], parts: Parts) -> tuple[fx.Node | None, fx.Node | None]:
    """What is added to the scores, and the spans that rows see; None for nothing, for all keys. Sites with equal masks
    share both."""
    query, key = (context.value(given[name]) for name in ("query", "key"))
    tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
    if not isinstance(parts.runs, Everything) and given["bias"] is None:
        texts = str(conjunction([parts.spans, parts.known, parts.runs])), str(parts.keys)
        both = context.shared(
            ("spans or mask", texts, mask_key(given)),
            lambda: context.call(spans_or_mask, *texts, tensors, query, key),
        )
        seen = context.shared(("spans of", both), lambda: context.call(operator.getitem, both, 0))
        mask = context.shared(("mask of", both), lambda: context.call(operator.getitem, both, 1))
        return mask, seen
    return _mask_node(context, given, parts, query, key, tensors), _span_node(
        context, given, parts, query, key, tensors
    )


def _mask_node(
    context: Context, given: dict[str, Any], parts: Parts, query: fx.Node, key: fx.Node, tensors: list[fx.Node]
) -> fx.Node | None:
    hidden = conjunction([part for part in (parts.rest, parts.runs, parts.keys) if not isinstance(part, Everything)])
    if given["bias"] is not None and isinstance(hidden, Everything):
        return context.value(given["bias"])  # the kernel spreads it
    if given["bias"] is not None or not isinstance(parts.rest, Everything):
        bias = None if given["bias"] is None else context.value(given["bias"])
        fill = -math.inf if given.get("mask_fill") is None or bias is None else given["mask_fill"]
        text = str(hidden)
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
    """An additive mask: the bias, and ``fill`` where the predicate does not hold; of the size of the scores only where
    rows differ."""
    return additive_mask(text, tensors, bias, None, query, key.shape[2], fill)


def padding_mask(text: str, tensors: list[Tensor], query: Tensor, key: Tensor) -> Tensor | None:
    """``[batch, 1, 1, keys]``: minus infinity at padded keys; None in a batch without any."""
    seen = to_dense(parsed(text), tensors, query.shape[0], 1, 1, key.shape[2])
    return None if bool(seen.all()) else torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def _span_node(
    context: Context, given: dict[str, Any], parts: Parts, query: fx.Node, key: fx.Node, tensors: list[fx.Node]
) -> fx.Node | None:
    """Made now where nothing is unknown, else in each call."""
    if isinstance(parts.spans, Everything) and isinstance(parts.known, Everything):
        return None
    table = _known_table(context, given, parts.spans, parts.known)
    if table is not None:
        return context.bind(table, "spans")
    text = str(parts.spans)
    node: fx.Node = context.shared(
        ("span call", text, mask_key(given)), lambda: context.call(spans_of, text, tensors, query, key)
    )
    return node


def spans_of(text: str, tensors: list[Tensor], query: Tensor, key: Tensor) -> Tensor:
    """The spans of a call."""
    return span_table(text, tensors, query.shape[1], query.shape[2], key.shape[2])


def span_table(text: str, tensors: list[Tensor], heads: int, length: int, keys: int) -> Tensor:
    """Where the intervals of keys that each row sees start and end: ``[2, batch or 1, heads or 1, length, count]``."""
    found = spans(parsed(text), heads, length, keys, tensors)
    assert found is not None  # by the form of the predicate
    return found


def spans_or_mask(
    text: str, padding: str, tensors: list[Tensor], query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The spans of a call and its padding; where the tensors make too many spans, all of it as one additive mask."""
    heads, length, keys = query.shape[1], query.shape[2], key.shape[2]
    found = spans(parsed(text), heads, length, keys, tensors, dense=True, limit=_WORTH_MEETING)
    if found is not None:
        return found, None if padding == "all" else padding_mask(padding, tensors, query, key)
    _say_dense(text)
    both = str(conjunction([parsed(text), parsed(padding)]))
    return None, additive_mask(both, tensors, None, None, query, keys, -math.inf)


@functools.lru_cache(maxsize=256)
def _say_dense(text: str) -> None:
    _LOG.warning("the mask %s has rows with more than %d runs of keys: it is a tensor of all scores", text, MOST_SPANS)


def sample_runs(context: Context, given: dict[str, Any], form: AttentionShape) -> dict[str, Callable[[], Any]]:
    """Both kernels on random operands that lie in memory as a projection leaves them, and a mask of the site's kind.
    Where tensors decide what a mask's spans are, it is that of the example inputs (the native kernel alone where these
    do not tell); any other that depends on tensors lets everything through."""
    query = torch.randn(form.batch, form.length, form.heads, form.head_dim).transpose(1, 2)
    key = torch.randn(form.batch, form.keys, form.kv_heads, form.head_dim).transpose(1, 2)
    value = torch.randn(form.batch, form.keys, form.kv_heads, form.value_dim).transpose(1, 2)
    scale, grouped = given["scale"], form.heads != form.kv_heads
    masks = _sample_masks(context, given, form, query, key)
    mask, causal, added, table = masks or (None, False, None, None)
    native = {"native": lambda: attend_native(query, key, value, added, None, None, scale, 0.0, table, "nan")}
    if masks is None:
        return native
    return {"sdpa": lambda: attend_sdpa(query, key, value, mask, causal, scale, grouped), **native}


def _sample_masks(
    context: Context, given: dict[str, Any], form: AttentionShape, query: Tensor, key: Tensor
) -> tuple[Tensor | None, bool, Tensor | None, Tensor | None] | None:
    """The mask of PyTorch's attention and whether it is the causal flag; mask and spans of the native kernel. None
    where the example inputs do not tell, or a bias is added besides."""
    parts = take_apart(context, given)
    if not isinstance(parts.runs, Everything) or not isinstance(parts.known, Everything):
        tensors = None if form.has_bias else _example_tensors(context, given["mask_tensors"])
        if tensors is None:
            return None
        exact = additive_mask(form.mask, tensors, None, None, query, form.keys, -math.inf)
        seen = str(conjunction([parts.spans, parts.known, parts.runs]))
        table, added = spans_or_mask(seen, str(parts.keys), tensors, query, key)
        return exact, False, added, table
    predicate = parse(form.mask)
    known = without_keys(predicate) or predicate
    dense: Tensor | None = None
    if form.has_bias or tensors_of(known):
        known, dense = Everything(), torch.zeros(1, 1, form.length, form.keys)
    causal = is_flag(known, form.length, form.keys) == "causal"
    mask, table = dense, None
    if not isinstance(known, Everything):
        if most_spans(known) <= MOST_SPANS:
            table = span_table(str(known), [], form.heads, form.length, form.keys)
        if not causal or table is None:
            mask = additive_mask(str(known), [], None, None, query, form.keys, -math.inf)
    return mask, causal, dense if table is not None else mask, table


def _example_tensors(context: Context, nodes: list[fx.Node]) -> list[Tensor] | None:
    """What a mask reads, on the example inputs; None where it is not to be had."""
    program = context.program
    if not all(index_like(program, node) for node in nodes):
        return None  # it takes running the model
    try:
        found = Probe(program, [], Pool(), program.example).evaluate(nodes)
    except ProbeError:
        return None
    return found if all(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in found) else None
