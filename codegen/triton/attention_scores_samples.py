"""The kernels of the catalogue (``catalogue.py``) that look at attention's scores alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from regraft.codegen.triton.attention_columns import emit_columns
from regraft.codegen.triton.attention_rows import emit_rows
from regraft.codegen.triton.attention_samples import CAUSAL
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.attention_topk import MOST_KEPT, TopkSpec, emit_topk
from regraft.codegen.triton.emit import Kernel, dtype_name
from regraft.codegen.triton.mask_operands import mask_operands
from regraft.ir.ops.token_scores import PRESENT

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class ScoreSample:
    """One kernel: what its scores are made of, and what emits it."""

    spec: AttentionSpec
    emit: Callable[[], Kernel]

    @property
    def square(self) -> bool:
        """Whether a tensor of its mask tells of queries and of keys, of which there are as many."""
        return any({"rows", "keys"} <= mask.reads for mask in mask_operands([self.spec.predicate]))


def score_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    return {name: sample.emit for name, sample in all_scores().items()}


def all_scores() -> dict[str, ScoreSample]:
    """The samples by name: what is found, element type, head_dim, and what is special."""
    plain = {
        f"{dtype_name(dtype)} {dim}": AttentionSpec(dtype, dim, dim, CAUSAL, empty_rows="zero")
        for dtype in (_BF16, _FP16, _FP32)
        for dim in ((64, 128) if dtype == _FP16 else (64, 80, 128, 256, 512))
    }
    special = {
        "bfloat16 64 all": AttentionSpec(_BF16, 64, 64),
        "bfloat16 64 padding": AttentionSpec(_BF16, 64, 64, PRESENT, empty_rows="zero"),
        "bfloat16 128 documents": AttentionSpec(_BF16, 128, 128, f"same(0,1) & {CAUSAL}"),
        "bfloat16 128 everything": AttentionSpec(
            _BF16, 128, 128, f"dense(0) & {CAUSAL}", bias="dense", slopes=True, sinks=True, softcap=True
        ),
    }
    found: dict[str, ScoreSample] = {}
    for name, spec in (plain | special).items():
        found[f"rows {name}"] = ScoreSample(spec, partial(emit_rows, spec))
        found[f"columns {name}"] = ScoreSample(spec, partial(emit_columns, spec))
    largest = AttentionSpec(_BF16, 128, 128, CAUSAL)
    found["largest bfloat16 128"] = ScoreSample(largest, partial(emit_rows, largest, "largest"))
    for dtype in (_BF16, _FP32):
        for dim, count, shared in (
            (64, 16, False),
            (128, 16, True),
            (128, 64, False),
            (128, MOST_KEPT[dtype.itemsize], True),
            (256, 32, True),
        ):
            spec = AttentionSpec(dtype, dim, dim, "keys(0)")
            name = f"topk {dtype_name(dtype)} {dim} {count}{' of groups' if shared else ''}"
            found[name] = ScoreSample(spec, partial(emit_topk, TopkSpec(spec, count, shared)))
    return found
