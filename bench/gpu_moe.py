"""The part "moe" of ``make gpu``: routed experts beside PyTorch's grouped product and vLLM's fused kernel.

With many tokens a row's rate is that of its products, over the arithmetic that the device's data sheet names; with few,
the bytes of the experts that some token asks for, read once, over the bandwidth of a copy. Routing is random and even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_rows import Outcome, Part, Row, Setting, copy_bandwidth, device_times, offered
from bench.plain_models import grouped_experts
from regraft.codegen.triton.gemm.experts import emit_experts
from regraft.codegen.triton.gemm.experts_spec import ExpertsSpec
from regraft.codegen.triton.load import load_kernel
from regraft.ir.device import DEVICES
from regraft.ir.ops.moe import reference
from regraft.ir.verify import relative_l2

_LARGE, _SMALL, _ERROR = 0.35, 0.7, 1.2e-2


@dataclass(frozen=True)
class _Case:
    """``experts`` of ``hidden`` and ``inner``, of which each of ``tokens`` takes ``top_k``."""

    tokens: int
    experts: int
    hidden: int
    inner: int
    top_k: int

    @property
    def large(self) -> bool:
        """Whether arithmetic is the limit: an expert has more pairs than the device has operations a byte."""
        return self.tokens * self.top_k > 256 * self.experts

    @property
    def flops(self) -> float:
        """Operations of the three products."""
        return 6.0 * self.tokens * self.top_k * self.hidden * self.inner


def _cases() -> dict[str, _Case]:
    return {
        "8192 tokens, 8 of 14336": _Case(8192, 8, 4096, 14336, 2),
        "16 tokens, 8 of 14336": _Case(16, 8, 4096, 14336, 2),
        "8192 tokens, 128 of 768": _Case(8192, 128, 2048, 768, 8),
        "128 tokens, 128 of 768": _Case(128, 128, 2048, 768, 8),
        "16 tokens, 128 of 768": _Case(16, 128, 2048, 768, 8),
    }


def rows(setting: Setting) -> dict[str, Row]:
    """A row a case."""
    return {name: partial(_row, case) for name, case in _cases().items()}


def _row(case: _Case, setting: Setting) -> Outcome:
    sized = setting.pick(case, _Case(min(case.tokens, 33), 5, 24, 20, 2))
    given = _operands(sized, setting.device)
    spec = ExpertsSpec(torch.bfloat16, torch.bfloat16, sized.experts, sized.hidden, sized.inner)
    kernel = emit_experts(spec)
    operator, operands = load_kernel(kernel).operator, [given[name] for name in kernel.operands]
    calls: dict[str, Callable[[], Any]] = {"regraft": lambda: operator(*operands)}
    error = relative_l2(operator(*operands), reference(**given))
    calls |= offered(_peers(given)) if setting.on_gpu else {}
    if setting.on_gpu:
        square = torch.randn(8192, 8192, device=setting.device, dtype=torch.bfloat16)
        calls["product of 8192"] = lambda: square @ square
    times = device_times(calls, setting)
    figures: dict[str, Any] = {"error": error} | {f"{name} ms": spent for name, spent in times.items()}
    figures["TFLOP/s"] = sized.flops / times["regraft"] * 1e-9
    if "product of 8192" in times:
        figures["share of the rate of a product of 8192"] = (
            figures["TFLOP/s"] * times["product of 8192"] / (2 * 8192**3 * 1e-9)
        )
    peers = [spent for name, spent in times.items() if name not in ("regraft", "product of 8192")]
    if peers:
        figures["best peer over regraft"] = min(peers) / times["regraft"]
    return _judged(case, figures, given, times["regraft"], setting)


def _judged(case: _Case, figures: dict[str, Any], given: dict[str, Tensor], spent: float, setting: Setting) -> Outcome:
    right = figures["error"] <= _ERROR
    if case.large:
        known = next((device for name, device in DEVICES.items() if name in setting.gpu_name), None)
        target = f"{_LARGE:.0%} of the device's peak"
        if known is None:
            return Outcome(figures, None if right else False, target)
        figures["share of the peak"] = figures["TFLOP/s"] * 1e12 / known.peak(torch.bfloat16)
        met = {"experts, many tokens": right and figures["share of the peak"] >= _LARGE}
        return Outcome(figures, all(met.values()), target, met)
    asked = len(given["index"].unique())
    moved = asked * (given["first"][0].nbytes + given["down"][0].nbytes)
    figures["GB/s of weights"] = moved / spent * 1e-6
    figures["share of the bandwidth of a copy"] = moved / (spent * 1e-3) / copy_bandwidth(setting)
    target = f"{_SMALL:.0%} of a copy's bandwidth"
    if not setting.on_gpu:
        return Outcome(figures, None if right else False, target)
    met = {"experts, few tokens": right and figures["share of the bandwidth of a copy"] >= _SMALL}
    return Outcome(figures, all(met.values()), target, met)


def _operands(case: _Case, device: str) -> dict[str, Tensor]:
    make = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=make, device=device, dtype=torch.bfloat16)

    scores = torch.rand(case.tokens, case.experts, generator=make, device=device)
    weight, index = scores.topk(case.top_k)
    return {
        "hidden": draw(case.tokens, case.hidden),
        "index": index,
        "weight": (weight / weight.sum(-1, keepdim=True)).bfloat16(),
        "first": draw(case.experts, 2 * case.inner, case.hidden) * case.hidden**-0.5,
        "down": draw(case.experts, case.hidden, case.inner) * case.inner**-0.5,
    }


def _peers(given: dict[str, Tensor]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes each peer's call."""
    ordered = [given[name] for name in ("hidden", "index", "weight", "first", "down")]

    def plain() -> Callable[[], Any]:
        return lambda: grouped_experts(*ordered)

    def compiled() -> Callable[[], Any]:
        run = torch.compile(grouped_experts, dynamic=False)
        return lambda: run(*ordered)

    def vllm() -> Callable[[], Any]:
        from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

        hidden, index, weight, first, down = ordered
        weights, ids = weight.float(), index.int()
        return lambda: fused_experts(hidden, first, down, weights, ids)

    return {"grouped_mm": plain, "grouped_mm, torch.compile": compiled, "vllm": vllm}


MOE = Part("moe", 40.0, rows)
