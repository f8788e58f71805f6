"""The part "tests" of ``make gpu``: every attention, score and token kernel of the catalogue against its definition in
fp64.

bf16 is tested nowhere else: Triton's interpreter computes its products wrongly. A row is the relative L2 error of one
kernel at sizes that are no multiple of any tile, and of its log-sum-exp where it gives one. A plan is compared with the
definition's, token by token: tokens that are alike but for rounding may change places, so nearly all must agree. On a
CPU the operator's own CPU kernel is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_operands import Sizes, attention_operands, merge_operands, on_wide
from bench.gpu_programs import program_rows
from bench.gpu_rows import Outcome, Part, Row, Setting
from bench.gpu_token_operands import merged_operands, plan_operands
from regraft.codegen.triton.attention_layout import CONTIGUOUS
from regraft.codegen.triton.attention_merge import MergeSpec
from regraft.codegen.triton.attention_samples import AttentionSample, all_attention
from regraft.codegen.triton.attention_scores_samples import ScoreSample, all_scores
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.plan_spec import PlanSpec
from regraft.codegen.triton.tokens.samples import plan_specs, token_samples

#: Largest relative L2 error by element type: rounding of weights and of the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
#: Of a plan's tokens, how many are where the definition has them.
AGREED = 0.98


def rows(setting: Setting) -> dict[str, Row]:
    """A row a kernel, and those of whole programs."""
    plans, merges = plan_specs(), token_samples()
    return {
        **{name: partial(_row, sample) for name, sample in all_attention().items()},
        **{name: partial(_scores, sample) for name, sample in all_scores().items()},
        **{name: partial(_plan, spec) for name, spec in plans.items()},
        **{name: partial(_moved, emit) for name, emit in merges.items() if name not in plans},
        **program_rows(),
    }


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
    return Outcome(figures, passed, f"error at most {tolerance:g}", {"numbers": passed})


def _scores(sample: ScoreSample, setting: Setting) -> Outcome:
    """A kernel that looks at scores alone. Of the highest keys, scores are compared: keys that are alike may differ."""
    kernel = sample.emit()
    module = load_kernel(kernel)
    queries = setting.pick(301, 21)
    sizes = Sizes(2, 4, 3, queries, queries if sample.square else setting.pick(333, 300))
    given = attention_operands(sample.spec, sizes, setting.device)
    wide = on_wide(given)
    found = _tuple(module.operator(*(given[name] for name in kernel.operands)))[0]
    operands = [wide[name] for name in kernel.operands]
    wanted = _tuple(module.reference(*operands))[0]
    error, tolerance = _error(found, wanted), TOLERANCE[sample.spec.dtype]
    passed = error <= tolerance
    return Outcome({"error": error}, passed, f"error at most {tolerance:g}", {"numbers": passed})


def _plan(spec: PlanSpec, setting: Setting) -> Outcome:
    module, given = load_kernel(emit_plan(spec)), plan_operands(spec, setting.device, setting.pick(197, 37))
    operands = [given[name] for name in spec.operands]
    found, wanted = module.operator(*operands), module.reference(*operands)
    agreed = float((_stands_for(found) == _stands_for(wanted)).float().mean())
    again = all(torch.equal(a, b) for a, b in zip(found, module.operator(*operands), strict=True))
    passed = agreed >= AGREED and again
    figures = {"tokens that go to the same": agreed, "the same again": again}
    return Outcome(figures, passed, f"{AGREED:.0%} agree, the same plan again", {"numbers": passed})


def _stands_for(plan: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Of every token the one that it becomes a part of, itself where it stays, -1 where it is dropped."""
    kept, _, slots = plan
    return kept.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)


def _moved(emit: Callable[[], Kernel], setting: Setting) -> Outcome:
    """Tokens merged, or put back."""
    kernel = emit()
    module = load_kernel(kernel)
    given = merged_operands(module, setting.device, setting.pick(197, 37))
    wide = on_wide(given)
    found = _tuple(module.operator(*(given[name] for name in kernel.operands)))
    wanted = _tuple(module.reference(*(wide[name] for name in kernel.operands)))
    error = max(_error(a, b) for a, b in zip(found, wanted, strict=True))
    tolerance = TOLERANCE[given["x"].dtype]
    passed = error <= tolerance
    return Outcome({"error": error}, passed, f"error at most {tolerance:g}", {"numbers": passed})


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; infinite where numbers that are not finite stand in other places, or nothing is finite."""
    finite = torch.isfinite(wanted)
    if not finite.any() or not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    found, wanted = found.double()[finite], wanted.double()[finite]
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


TESTS = Part("tests", 70.0, rows, processes=12)
