"""The attention kernels of the catalogue (``catalogue.py``): head dims, element types, masks, weights, key layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    "half of the heads local": "band(None,0) & (heads(0,8) | band(-511,None))",
    "dense": "dense(0)",
}
_TREE = "prefix(key_len - query_len) | bits(0)"


@dataclass(frozen=True)
class AttentionSample:
    """One attention of the catalogue: a prefill, with a ``layout`` a decode, or a merge."""

    spec: AttentionSpec | MergeSpec
    layout: KeyLayout | None = None

    def emit(self) -> Kernel:
        """Its kernel."""
        if isinstance(self.spec, MergeSpec):
            return emit_merge(self.spec)
        return emit_prefill(self.spec) if self.layout is None else emit_decode(self.spec, self.layout)


def attention_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    return {name: sample.emit for name, sample in all_attention().items()}


def all_attention() -> dict[str, AttentionSample]:
    """The samples by name: kind, element type, head_dim, and what is special."""
    specs = {
        f"prefill {dtype_name(dtype)} {dim}": AttentionSpec(dtype, dim, dim, CAUSAL, empty_rows="zero")
        for dtype in (_BF16, _FP16, _FP32)
        for dim in (HEAD_DIMS if dtype != _FP16 else (64, 128))
    }
    specs |= {f"prefill bfloat16 {dim} dense": AttentionSpec(_BF16, dim, dim) for dim in (64, 128)}
    specs["prefill bfloat16 192 values 128"] = AttentionSpec(_BF16, 192, 128, CAUSAL, empty_rows="zero")
    specs |= {f"prefill bfloat16 128 {name}": AttentionSpec(_BF16, 128, 128, mask) for name, mask in MASKS.items()}
    return {name: AttentionSample(spec) for name, spec in (specs | _options()).items()} | _decode() | _merge()


def _options() -> dict[str, AttentionSpec]:
    """What changes scores and weights, one at a time; and all at once."""
    specs = {
        "padding that was a number": AttentionSpec(_BF16, 128, 128, "keys(0)", empty_rows="mean"),
        "number at masked scores": AttentionSpec(_BF16, 128, 128, CAUSAL, mask_fill=-1.0),
        "bias of keys": AttentionSpec(_BF16, 128, 128, bias="keys"),
        "slopes": AttentionSpec(_BF16, 128, 128, CAUSAL, empty_rows="zero", slopes=True),
        "sinks, softcap, lse": AttentionSpec(_BF16, 128, 128, CAUSAL, sinks=True, softcap=True, lse=True),
    }
    specs |= {f"bias {dim}": AttentionSpec(_BF16, dim, dim, bias="dense") for dim in (64, 128, 256)}
    pairs = [(weight, "none") for weight in WEIGHTS] + [("sigmoid", how) for how in NORMALISERS[2:]]
    specs |= {
        f"{weight}, {normaliser}": AttentionSpec(_BF16, 64, 64, CAUSAL, weight=weight, normaliser=normaliser)
        for weight, normaliser in pairs
    }
    named = {
        f"prefill bfloat16 {spec.head_dim} {name.removesuffix(f' {spec.head_dim}')}": spec
        for name, spec in specs.items()
    }
    for dtype, dim in ((_BF16, 128), (_FP32, 64)):
        every = AttentionSpec(
            dtype, dim, dim, f"dense(0) & {CAUSAL}", bias="dense", slopes=True, sinks=True, softcap=True, lse=True
        )
        named[f"prefill {dtype_name(dtype)} {dim} everything"] = every
    return named


def _decode() -> dict[str, AttentionSample]:
    found: dict[str, AttentionSample] = {}
    for dtype in (_BF16, _FP32):
        for dim in (64, 80, 128, 256, 512):
            spec = AttentionSpec(dtype, dim, dim, LAST, empty_rows="zero")
            found[f"decode {dtype_name(dtype)} {dim}"] = AttentionSample(spec, CONTIGUOUS)
    plain = AttentionSpec(_BF16, 128, 128, LAST, empty_rows="zero")
    local = AttentionSpec(_BF16, 128, 128, f"{LAST} & (heads(0,8) | band(key_len - query_len - 511,None))")
    sigmoid = AttentionSpec(_BF16, 128, 128, LAST, weight="sigmoid", normaliser="none")
    rest = {
        "half of the heads local": AttentionSample(local, CONTIGUOUS),
        "tree of drafts": AttentionSample(AttentionSpec(_BF16, 128, 128, _TREE), CONTIGUOUS),
        "sinks, lse": AttentionSample(AttentionSpec(_BF16, 128, 128, LAST, sinks=True, lse=True), CONTIGUOUS),
        "bias": AttentionSample(AttentionSpec(_BF16, 128, 128, LAST, bias="dense"), CONTIGUOUS),
        "sigmoid": AttentionSample(sigmoid, CONTIGUOUS),
        "pages of 16": AttentionSample(plain, KeyLayout("paged", 16)),
        "pages of 64": AttentionSample(plain, KeyLayout("paged", 64)),
        "listed keys": AttentionSample(plain, KeyLayout("indexed", 1)),
        "listed blocks of 16": AttentionSample(plain, KeyLayout("indexed", 16)),
    }
    return found | {f"decode bfloat16 128 {name}": sample for name, sample in rest.items()}


def _merge() -> dict[str, AttentionSample]:
    specs = [MergeSpec(dtype, dim) for dtype in (_BF16, _FP32) for dim in (64, 128, 512)]
    found = {f"merge {dtype_name(spec.dtype)} {spec.value_dim}": AttentionSample(spec) for spec in specs}
    return found | {"merge bfloat16 128 sinks": AttentionSample(MergeSpec(_BF16, 128, sinks=True))}
