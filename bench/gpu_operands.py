"""Operands for an attention kernel of any spec, drawn at random on a device: as models have them, or hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.codegen.triton.attention_layout import CONTIGUOUS, KeyLayout
from regraft.codegen.triton.attention_merge import MergeSpec
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.mask_operands import MaskOperand, mask_operands

_DOCUMENT = 100  # tokens of a document, of those that are packed
_WORD = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of one attention; ``heads`` is ``kv_heads * group``."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int


def attention_operands(
    spec: AttentionSpec, sizes: Sizes, device: str, layout: KeyLayout = CONTIGUOUS, seed: int = 0
) -> dict[str, Any]:
    """A value for each operand of the kernel of a spec, by name. The last batch is shorter where keys lie in pages."""
    make = torch.Generator(device).manual_seed(seed)
    heads = sizes.kv_heads * sizes.group

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=device)

    keys = (sizes.batch, sizes.keys, sizes.kv_heads)
    given: dict[str, Any] = {
        "query": draw(sizes.batch, sizes.queries, heads, spec.head_dim).transpose(1, 2).to(spec.dtype),
        "key": draw(*keys, spec.head_dim).transpose(1, 2).to(spec.dtype),
        "value": draw(*keys, spec.value_dim).transpose(1, 2).to(spec.dtype),
        "scale": spec.head_dim**-0.5,
        "softcap": 20.0,
        "slopes": -draw(heads).abs() / 8,
        "sinks": draw(heads),
    }
    if spec.bias != "none":
        rows = sizes.queries if spec.bias == "dense" else 1
        given["bias"] = draw(1, heads, rows, sizes.keys).to(spec.dtype)
    for mask in mask_operands([spec.predicate]):
        given[mask.name] = _mask_tensor(mask, sizes, make, device)
    if layout.kind == "paged":
        given |= _paged(given, sizes, layout.page_size, make)
    if layout.kind == "indexed":
        given["pages"] = _listed(sizes, layout.page_size, make, device)
    return given


def _mask_tensor(mask: MaskOperand, sizes: Sizes, make: torch.Generator, device: str) -> Tensor:
    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=make, device=device)

    length = sizes.queries if "rows" in mask.reads and "keys" not in mask.reads else sizes.keys
    if "length" in mask.reads:
        return drawn(sizes.keys // 2, sizes.keys + 1, sizes.batch)
    if "pairs" in mask.reads:
        seen = drawn(0, 4, sizes.batch, 1, sizes.queries, sizes.keys) > 0
        seen[..., 0] = True  # no row without keys: what such a row gives is another test
        return seen
    if "bits" in mask.reads:
        words = drawn(0, 1 << 62, sizes.batch, sizes.queries, (sizes.queries + _WORD - 1) // _WORD)
        return words | 1
    if mask.compared:
        documents = torch.arange(length, device=device, dtype=torch.int32) // _DOCUMENT
        return documents.expand(sizes.batch, length).contiguous()
    present = torch.ones(sizes.batch, length, dtype=torch.bool, device=device)
    present[-1, -(length // 3) or length :] = False
    return present


def _paged(given: dict[str, Any], sizes: Sizes, page_size: int, make: torch.Generator) -> dict[str, Any]:
    """Keys and values in a cache of shuffled pages; places that hold none are NaN."""
    device, count = given["key"].device, -(-sizes.keys // page_size)
    lengths = torch.full((sizes.batch,), sizes.keys, dtype=torch.int32, device=device)
    lengths[-1] = max(sizes.queries, sizes.keys * 2 // 3)
    pages = torch.randperm(sizes.batch * count, generator=make, device=device).reshape(sizes.batch, count).int()
    found: dict[str, Any] = {"pages": pages, "lengths": lengths}
    for name in ("key", "value"):
        dim = given[name].shape[-1]
        whole = torch.nn.functional.pad(given[name], (0, 0, 0, count * page_size - sizes.keys), value=torch.nan)
        places = torch.arange(count * page_size, device=device)
        whole = whole.masked_fill((places >= lengths[:, None])[:, None, :, None], torch.nan)
        cut = whole.reshape(sizes.batch, sizes.kv_heads, count, page_size, dim).transpose(1, 2)
        cache = torch.empty_like(cut.reshape(-1, sizes.kv_heads, page_size, dim))
        cache[pages.reshape(-1).long()] = cut.reshape(-1, sizes.kv_heads, page_size, dim)
        found[name] = cache
    return found


def _listed(sizes: Sizes, page_size: int, make: torch.Generator, device: str) -> Tensor:
    """A third of the blocks for each batch and group of heads, the last among them; one place lists none."""
    blocks = -(-sizes.keys // page_size)
    kept = max(1, blocks // 3)
    order = torch.rand(sizes.batch, sizes.kv_heads, blocks, generator=make, device=device)
    order[..., 0] = 2.0
    pages = order.argsort(-1, descending=True)[..., :kept].int()
    return torch.cat([pages, torch.full_like(pages[..., :1], -1)], -1)


def merge_operands(spec: MergeSpec, device: str, seed: int = 0) -> dict[str, Any]:
    """Parts of which some have no key of a row; their output there is NaN."""
    make = torch.Generator(device).manual_seed(seed)
    parts = torch.randn(5, 2, 6, 77, spec.value_dim, generator=make, device=device).to(spec.dtype)
    lse = torch.randn(5, 2, 6, 77, generator=make, device=device) * 10
    absent = torch.rand(lse.shape, generator=make, device=device) < 0.2
    absent[0] = False
    parts[absent] = torch.nan
    sinks = torch.randn(6, generator=make, device=device)
    return {"parts": parts, "part_lse": lse.masked_fill(absent, -torch.inf), "sinks": sinks}


def on_wide(given: dict[str, Any]) -> dict[str, Any]:
    """The operands in fp64, masks and places as they are: what a reference is computed from."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
