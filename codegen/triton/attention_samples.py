"""The attention kernels of the catalogue (``catalogue.py``): head dims, element types, masks, weights, key layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from regraft.codegen.triton.attention_decode import emit_decode
from regraft.codegen.triton.attention_layout import CONTIGUOUS, KeyLayout
from regraft.codegen.triton.attention_merge import MergeSpec, emit_merge
from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import NORMALISERS, WEIGHTS, AttentionSpec
from regraft.codegen.triton.emit import Kernel, dtype_name

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CAUSAL, LAST = "band(None,0)", "band(None,key_len - query_len)"
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256, 320, 512)

#: Masks as models have them, by the name of their row in the table.
MASKS: dict[str, str] = {
    "window": "band(-511,0)",
    "sink+window": "prefix(4) & band(None,0) | band(-511,0)",
    "documents": "same(0,1) & band(None,0)",
    "padding": "keys(0)",
    "lengths": "lengths(0) & band(None,0)",
    "chunks": "chunk(256)",
    "prefix": "prefix(64) | band(None,0)",
    "half of the heads local": "band(None,0) & (heads(0,16) | band(-511,None))",
    "dense": "dense(0)",
}
_TREE = "prefix(key_len - query_len) | bits(0)"


def attention_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    found: dict[str, Callable[[], Kernel]] = {}
    for dtype in (_BF16, _FP16, _FP32):
        for dim in HEAD_DIMS if dtype != _FP16 else (64, 128):
            spec = AttentionSpec(dtype, dim, dim, CAUSAL, empty_rows="zero")
            found[f"prefill {dtype_name(dtype)} {dim}"] = partial(emit_prefill, spec)
    for dim in (64, 128):
        found[f"prefill bfloat16 {dim} dense"] = partial(emit_prefill, AttentionSpec(_BF16, dim, dim))
    found["prefill bfloat16 192 values 128"] = partial(
        emit_prefill, AttentionSpec(_BF16, 192, 128, CAUSAL, empty_rows="zero")
    )
    for name, mask in MASKS.items():
        found[f"prefill bfloat16 128 {name}"] = partial(emit_prefill, AttentionSpec(_BF16, 128, 128, mask))
    return {**found, **_options(), **_decode(), **_merge()}


def _options() -> dict[str, Callable[[], Kernel]]:
    """What changes scores and weights, one at a time."""
    specs = {
        "padding that was a number": AttentionSpec(_BF16, 128, 128, "keys(0)", empty_rows="mean"),
        "number at masked scores": AttentionSpec(_BF16, 128, 128, CAUSAL, mask_fill=-1.0),
        "bias": AttentionSpec(_BF16, 128, 128, bias="dense"),
        "bias of keys": AttentionSpec(_BF16, 128, 128, bias="keys"),
        "slopes": AttentionSpec(_BF16, 128, 128, CAUSAL, empty_rows="zero", slopes=True),
        "sinks, softcap, lse": AttentionSpec(_BF16, 128, 128, CAUSAL, sinks=True, softcap=True, lse=True),
    }
    pairs = [(weight, "none") for weight in WEIGHTS] + [("sigmoid", how) for how in NORMALISERS[2:]]
    specs |= {
        f"{weight}, {normaliser}": AttentionSpec(_BF16, 64, 64, CAUSAL, weight=weight, normaliser=normaliser)
        for weight, normaliser in pairs
    }
    return {f"prefill bfloat16 {spec.head_dim} {name}": partial(emit_prefill, spec) for name, spec in specs.items()}


def _decode() -> dict[str, Callable[[], Kernel]]:
    found: dict[str, Callable[[], Kernel]] = {}
    for dtype in (_BF16, _FP32):
        for dim in (64, 80, 128, 256, 512):
            spec = AttentionSpec(dtype, dim, dim, LAST, empty_rows="zero")
            found[f"decode {dtype_name(dtype)} {dim}"] = partial(emit_decode, spec)
    plain = AttentionSpec(_BF16, 128, 128, LAST, empty_rows="zero")
    local = AttentionSpec(_BF16, 128, 128, f"{LAST} & (heads(0,16) | band(key_len - query_len - 511,None))")
    rest: dict[str, tuple[AttentionSpec, KeyLayout]] = {
        "half of the heads local": (local, CONTIGUOUS),
        "tree of drafts": (AttentionSpec(_BF16, 128, 128, _TREE), CONTIGUOUS),
        "sinks, lse": (AttentionSpec(_BF16, 128, 128, LAST, sinks=True, lse=True), CONTIGUOUS),
        "sigmoid": (AttentionSpec(_BF16, 128, 128, LAST, weight="sigmoid", normaliser="none"), CONTIGUOUS),
        "pages of 16": (plain, KeyLayout("paged", 16)),
        "pages of 64": (plain, KeyLayout("paged", 64)),
        "listed keys": (plain, KeyLayout("indexed", 1)),
        "listed blocks of 16": (plain, KeyLayout("indexed", 16)),
    }
    for name, (spec, layout) in rest.items():
        found[f"decode bfloat16 128 {name}"] = partial(emit_decode, spec, layout)
    return found


def _merge() -> dict[str, Callable[[], Kernel]]:
    specs = [MergeSpec(dtype, dim) for dtype in (_BF16, _FP32) for dim in (64, 128, 512)]
    found: dict[str, Callable[[], Kernel]] = {
        f"merge {dtype_name(spec.dtype)} {spec.value_dim}": partial(emit_merge, spec) for spec in specs
    }
    found["merge bfloat16 128 sinks"] = partial(emit_merge, MergeSpec(_BF16, 128, sinks=True))
    return found
