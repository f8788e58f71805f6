"""The part "tests" of ``make gpu``: every attention kernel of the catalogue against its definition in fp64.

bf16 is tested nowhere else: Triton's interpreter computes its products wrongly. A row is the relative L2 error of one
kernel at sizes that are no multiple of any tile, and of its log-sum-exp where it gives one; on a CPU the operator's own
CPU kernel is compared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_operands import Sizes, attention_operands, merge_operands, on_wide
from bench.gpu_rows import Outcome, Part, Row, Setting
from regraft.codegen.triton.attention_layout import CONTIGUOUS
from regraft.codegen.triton.attention_merge import MergeSpec
from regraft.codegen.triton.attention_samples import AttentionSample, all_attention
from regraft.codegen.triton.load import load_kernel

#: Largest relative L2 error by element type: rounding of weights and of the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def rows(setting: Setting) -> dict[str, Row]:
    """A row a kernel."""
    return {name: partial(_row, sample) for name, sample in all_attention().items()}


def _row(sample: AttentionSample, setting: Setting) -> Outcome:
    kernel = sample.emit()
    module = load_kernel(kernel)
    if isinstance(sample.spec, MergeSpec):
        given = merge_operands(sample.spec, setting.device)
    else:
        queries = setting.pick(301, 21) if sample.layout is None else 3
        sizes = Sizes(2, 4, 3, queries, setting.pick(333, 40))
        given = attention_operands(sample.spec, sizes, setting.device, sample.layout or CONTIGUOUS)
    operands = [given[name] for name in kernel.operands]
    found = _tuple(module.operator(*operands))
    wide = on_wide(given)
    wanted = _tuple(module.reference(*(wide[name] for name in kernel.operands)))
    errors = [_error(a, b) for a, b in zip(found, wanted, strict=True)]
    tolerance = TOLERANCE[sample.spec.dtype]
    figures: dict[str, Any] = {"error": errors[0]} | ({"error_lse": errors[1]} if len(errors) > 1 else {})
    passed = errors[0] <= tolerance and all(error <= TOLERANCE[torch.float16] for error in errors[1:])
    return Outcome(figures, passed, f"error at most {tolerance:g}")


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; infinite where numbers that are not finite stand in other places, or nothing is finite."""
    finite = torch.isfinite(wanted)
    if not finite.any() or not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    found, wanted = found.double()[finite], wanted.double()[finite]
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


TESTS = Part("tests", 110.0, rows, processes=8)
