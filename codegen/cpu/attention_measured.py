"""What the choice between attention kernels is measured with: both on a site's sizes, with a mask of its kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from regraft.codegen.cpu.attention_blocks import attend_blocks
from regraft.codegen.cpu.attention_masks import (
    additive_mask,
    appended,
    conjunction,
    fixed_sizes,
    is_flag,
    mask_key,
    without_keys,
)
from regraft.codegen.cpu.attention_parts import Parts, bits_of, padding_mask, span_table, spans_or_bits, take_apart
from regraft.codegen.cpu.attention_sdpa import attend_sdpa, empty_rows
from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import attend_native
from regraft.ir import ops
from regraft.ir.mask import MOST_SPANS, Everything, every_row_nonempty, most_spans, parse, proof_lengths
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import arguments, concrete, dtype, shape
from regraft.ir.probe import Pool, Probe, ProbeError, index_like

_LARGEST_SAMPLE = 1 << 26  # scores; a larger site is not measured: reading no keys in vain decides there


@dataclass(frozen=True)
class AttentionShape:
    """What the choice of a kernel for an attention site depends on; ``mask`` is the predicate's text, ``sharing`` how
    many sites share the mask that a call makes, ``appended`` how many of the keys are joined to the others for it."""

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
    sharing: int = 1
    appended: int = 0

    def kernels(self) -> tuple[str, ...]:
        """Kernels that can run such a site here."""
        return ("sdpa", "blocks") if NATIVE.missing() else ("sdpa", "blocks", "native")


@dataclass(frozen=True)
class Sample:
    """Kernels of a site by name, each ready to run, and how a call makes the mask that each needs."""

    runs: dict[str, Callable[[], Any]]
    makes: dict[str, Callable[[], Any]] = field(default_factory=dict)


def measurable(context: Context, given: dict[str, Any]) -> bool:
    """Whether a site can be tried out: its sizes do not depend on data, and its scores are not too many."""
    tensors = [given[name].meta["val"] for name in ("query", "key", "value")]
    if any(free_unbacked_symbols(tensor) for tensor in tensors):
        return False
    form = shape_of(context, given)
    return form.batch * form.heads * form.length * form.keys <= _LARGEST_SAMPLE


def shape_of(context: Context, given: dict[str, Any]) -> AttentionShape:
    """The shape of a site; symbolic sizes are those of the example."""
    pieces = appended(given)
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
        sharing=_sites_with(context, given) if _made_in_calls(context, given) else 1,
        appended=0 if pieces is None else concrete(shape(pieces[1])[2]),
    )


def _made_in_calls(context: Context, given: dict[str, Any]) -> bool:
    """Whether the mask of a site, if it is a tensor, is made in each call."""
    return fixed_sizes(given) is None or not all(map(context.is_weight, given["mask_tensors"]))


def _sites_with(context: Context, given: dict[str, Any]) -> int:
    """How many sites have the mask of ``given``."""
    nodes = context.program.graph.nodes
    every: Counter[Any] = context.shared(
        "sites by mask", lambda: Counter(mask_key(arguments(node)) for node in nodes if node.target is ops.attention)
    )
    return max(every[mask_key(given)], 1)


def sample(context: Context, given: dict[str, Any], form: AttentionShape, other: str = "sdpa") -> Sample:
    """The native kernel and the ``other`` on random operands that lie in memory as a projection leaves them, and a mask
    of the site's kind.
    Where tensors decide what a mask is, it is that of the example inputs (the native kernel alone where these do not
    tell); any other that depends on tensors lets everything through."""
    query = _projected(form, form.length, form.heads, form.head_dim)
    key, value = (_projected(form, form.keys, form.kv_heads, size) for size in (form.head_dim, form.value_dim))
    scale, grouped = given["scale"], form.heads != form.kv_heads
    found = _sample_masks(context, given, form, query)
    own = found or _Masks()
    keys, values = ((part, part[:, :, :0]) for part in (key, value))
    if form.appended:
        keys, values = (_cached(part, form.appended) for part in (key, value))
    tables = own.added, None, None, scale, 0.0, own.spans, own.bits, "nan", "softmax", "sum", 0.0

    def native() -> Tensor:
        more = (keys[1], values[1]) if form.appended else ()
        out: Tensor = attend_native(query.float(), keys[0].float(), values[0].float(), *tables, *more)
        return out.to(form.dtype)

    def sdpa() -> Tensor:
        if not form.appended:
            return attend_sdpa(query, key, value, own.exact, own.causal, scale, grouped)
        return attend_sdpa(query, torch.cat(keys, 2), torch.cat(values, 2), own.exact, own.causal, scale, grouped)

    def blocks() -> Tensor:
        assert own.spans is not None
        return attend_blocks(query, key, value, own.spans, None, None, None, scale, "zero", 0.0)

    known = found is not None and (other != "blocks" or own.spans is not None)
    others = {"sdpa": sdpa, "blocks": blocks}
    if not known:
        return Sample({"native": native})
    return Sample({other: others[other], "native": native}, own.makes if other in own.makes else {})


def _projected(form: AttentionShape, length: int, heads: int, size: int) -> Tensor:
    return torch.randn(form.batch, length, heads, size, dtype=torch.float32).to(form.dtype).transpose(1, 2)


def _cached(whole: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``[batch, heads, length, size]`` as a cache holds its first part, and the last ``count``."""
    return whole[:, :, : whole.shape[2] - count].contiguous(), whole[:, :, whole.shape[2] - count :]


@dataclass(frozen=True)
class _Masks:
    """The mask of PyTorch's attention and whether it is the causal flag; what is added, spans and bits of the native
    kernel; how a call makes either's."""

    exact: Tensor | None = None
    causal: bool = False
    added: Tensor | None = None
    spans: Tensor | None = None
    bits: Tensor | None = None
    makes: dict[str, Callable[[], Any]] = field(default_factory=dict)


def _sample_masks(context: Context, given: dict[str, Any], form: AttentionShape, query: Tensor) -> _Masks | None:
    """None where the example inputs do not tell, or a bias is added besides."""
    parts = take_apart(context, given)
    runs_or_known = not isinstance(parts.runs, Everything) or not isinstance(parts.known, Everything)
    if (runs_or_known or not isinstance(parts.rest, Everything) or tensors_of(parts.spans)) and not form.has_bias:
        tensors = _example_tensors(context, given["mask_tensors"])
        if tensors is not None:
            return _example_masks(form, parts, tensors, query, _made_in_calls(context, given))
    if runs_or_known:
        return None
    predicate = parse(form.mask)
    known = without_keys(predicate) or predicate
    dense: Tensor | None = None
    if form.has_bias or tensors_of(known):
        known, dense = Everything(), torch.zeros(1, 1, form.length, form.keys, dtype=torch.float32)
    causal = is_flag(known, form.length, form.keys) == "causal"
    mask, table = None if dense is None else dense.to(form.dtype), None
    if not isinstance(known, Everything):
        if most_spans(known) <= MOST_SPANS:
            table = span_table(str(known), [], form.heads, form.length, form.keys)
        if not causal or table is None:
            mask = additive_mask(str(known), [], None, None, query, form.keys, -math.inf)
    added = dense if table is not None or mask is None else mask.float()
    return _Masks(mask, causal, added, table)


def _example_masks(form: AttentionShape, parts: Parts, tensors: list[Tensor], query: Tensor, in_calls: bool) -> _Masks:
    """The masks of the example inputs; ``in_calls``: each call makes them."""
    seen = str(conjunction([parts.spans, parts.known]))
    sizes = form.heads, form.length, form.keys

    def exact() -> Tensor:
        return additive_mask(form.mask, tensors, None, None, query, form.keys, -math.inf)

    def own() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        added = None if isinstance(parts.keys, Everything) else padding_mask(str(parts.keys), tensors, form.keys)
        table, bits = spans_or_bits(seen, str(parts.runs), tensors, *sizes)
        return added, table, bits if isinstance(parts.rest, Everything) else bits_of(str(parts.rest), tensors, *sizes)

    def settled() -> None:
        mask = exact()
        if not every_row_nonempty(parse(form.mask), *proof_lengths(form.length, form.keys)):
            empty_rows(mask)

    return _Masks(exact(), False, *own(), {"sdpa": settled, "native": own} if in_calls else {})


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
