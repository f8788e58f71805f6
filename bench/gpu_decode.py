"""The part "decode" of ``make gpu``: attention of few queries against many keys, beside the bandwidth of a copy.

A row's bytes are those of the keys and values that its mask asks for, read once for all heads that share them. What
counts is their rate over that of a copy of one GiB, which reads and writes, measured in the same row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu_operands import Sizes, attention_operands
from bench.gpu_rows import Outcome, Part, Row, Setting, copy_bandwidth, device_times
from regraft.codegen.triton.attention_decode import emit_decode
from regraft.codegen.triton.attention_layout import CONTIGUOUS, KeyLayout
from regraft.codegen.triton.attention_samples import LAST
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.load import load_kernel

_SHARE = 0.75
_WINDOW = 1024


@dataclass(frozen=True)
class _Case:
    """One decode: ``group`` heads share keys; ``local`` key heads of 8 see a window only."""

    group: int
    queries: int = 1
    mask: str = LAST
    layout: KeyLayout = CONTIGUOUS
    local: int = 0
    head_dim: int = 128


def _cases() -> dict[str, _Case]:
    near = f"band(key_len - query_len - {_WINDOW - 1},None)"
    split = f"{LAST} & (heads(0,16) | {near})"  # of 32 heads, four to a key head
    within = f"{LAST} & (heads(0,13) | {near})"  # of 24 heads, three to a key head: the fifth is asked for both
    tree = "prefix(key_len - query_len) | bits(0)"
    return {
        **{f"group of {group}": _Case(group) for group in (1, 3, 4, 5, 7, 8)},
        "group of 4, head_dim 64": _Case(4, head_dim=64),
        "half of the key heads local": _Case(4, mask=split, local=4),
        "local heads, some of them beside one that is not": _Case(3, mask=within, local=3),
        "tree of 16 drafts": _Case(4, queries=16, mask=tree),
        "pages of 16": _Case(4, layout=KeyLayout("paged", 16)),
        "pages of 64, group of 5": _Case(5, layout=KeyLayout("paged", 64)),
        "a third of the blocks of 16": _Case(4, layout=KeyLayout("indexed", 16)),
    }


def rows(setting: Setting) -> dict[str, Row]:
    """A row a case."""
    return {name: partial(_row, case) for name, case in _cases().items()}


def _row(case: _Case, setting: Setting) -> Outcome:
    sizes = Sizes(setting.pick(16, 2), 8, case.group, case.queries, setting.pick(8192, 96))
    spec = AttentionSpec(torch.bfloat16, case.head_dim, case.head_dim, case.mask, empty_rows="zero")
    given = attention_operands(spec, sizes, setting.device, case.layout)
    if "lengths" in given:
        given["lengths"].fill_(sizes.keys)
    kernel = emit_decode(spec, case.layout)
    operator, operands = load_kernel(kernel).operator, [given[name] for name in kernel.operands]
    calls: dict[str, Callable[[], Any]] = {"regraft": lambda: operator(*operands)}
    if case.layout == CONTIGUOUS and case.queries == 1 and case.mask == LAST:
        query, key, value = (given[name] for name in ("query", "key", "value"))
        grouped = case.group > 1
        calls["sdpa"] = lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    times = device_times(calls, setting)
    share = _bytes(case, sizes, given) / (times["regraft"] * 1e-3) / copy_bandwidth(setting)
    figures: dict[str, Any] = {f"{name} ms": milliseconds for name, milliseconds in times.items()}
    figures["GB/s"] = _bytes(case, sizes, given) / times["regraft"] * 1e-6
    figures["share of the bandwidth of a copy"] = share
    met = {"decode": share >= _SHARE} if setting.on_gpu else {}
    return Outcome(figures, met.get("decode"), f"{_SHARE:.0%} of a copy's bandwidth", met)


def _bytes(case: _Case, sizes: Sizes, given: dict[str, Any]) -> float:
    """Of the keys and values that some head reads."""
    a_key = 2.0 * case.head_dim * given["key"].element_size()
    if case.layout.kind == "indexed":
        listed = int((given["pages"] >= 0).sum())
        return a_key * listed * case.layout.page_size
    window = min(_WINDOW, sizes.keys)
    keys = (sizes.kv_heads - case.local) * sizes.keys + case.local * window
    return a_key * sizes.batch * keys


DECODE = Part("decode", 30.0, rows)
