"""The matrix products of the catalogue (``catalogue.py``): layers as models have them, at the sizes of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.expand import Calls
from regraft.codegen.triton.emit import Kernel, dtype_name
from regraft.codegen.triton.gemm.emit import emit_product
from regraft.codegen.triton.gemm.experts import emit_experts
from regraft.codegen.triton.gemm.experts_spec import ExpertsSpec
from regraft.codegen.triton.rowwise.samples import RegionSample, Writes
from regraft.ir import ops

aten = torch.ops.aten
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def product_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    return {name: sample.emit for name, sample in all_products().items()}


def all_products() -> dict[str, RegionSample]:
    """The layers by name."""
    found: dict[str, RegionSample] = {}
    rows = (8, 512, 4096)
    for kind in (_BF16, _FP16, _FP32):
        name = dtype_name(kind)
        found[f"linear, residual {name}"] = _sample(kind, _residual, rows, (4096, 4096), rows)
        found[f"gate and up {name}"] = _sample(kind, _gated, rows, (28672, 4096))
        found[f"linear, bias, gelu {name}"] = _sample(kind, _gelu, (8, 512, 768), (3072, 768), (3072,))
        found[f"rms norm, linear {name}"] = _sample(kind, _normed, rows, (4096,), (6144, 4096))
        found[f"norm of scores, gelu, linear {name}"] = _sample(kind, _token_parameters, rows, (768, 4096))
    found["rms norm, gate and up bfloat16"] = _sample(_BF16, _normed_gate, rows, (4096,), (28672, 4096))
    return found


def experts_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    return {name: partial(emit_experts, spec) for name, spec in all_experts().items()}


def all_experts() -> dict[str, ExpertsSpec]:
    """Experts of Mixtral's, DeepSeek-V3's and gpt-oss's sizes, and few wide ones without a gate, by name."""
    mixtral = ExpertsSpec(_BF16, _BF16, experts=8, hidden=4096, intermediate=14336)
    return {
        "8 of 14336, gate and up": mixtral,
        "8 of 14336, gate and up float16": replace(mixtral, dtype=_FP16, routing=_FP16),
        "8 of 14336, gate and up float32": replace(mixtral, dtype=_FP32, routing=_FP32),
        "256 of 2048, routed in fp32": ExpertsSpec(_BF16, _FP32, experts=256, hidden=7168, intermediate=2048),
        "32 of 2880, interleaved, biases": ExpertsSpec(
            _BF16,
            _BF16,
            experts=32,
            hidden=2880,
            intermediate=2880,
            layout="interleaved",
            activation="swish",
            transposed=True,
            first_bias=True,
            down_bias=True,
            alpha=1.702,
            limit=7.0,
            up_offset=1.0,
        ),
        "8 of 3072, gelu": ExpertsSpec(_BF16, _BF16, 8, 768, 3072, layout="single", activation="gelu"),
    }


def _sample(kind: torch.dtype, writes: Writes, *sizes: tuple[int, ...]) -> RegionSample:
    return RegionSample(kind, writes, sizes, emit_product)


def _linear(build: Calls, x: Any, weight: Any, bias: Any = None) -> fx.Node:
    return build.call(aten.linear.default, x, weight, bias)


def _residual(build: Calls, x: Any, weight: Any, residual: Any) -> list[fx.Node]:
    return [build.call(aten.add.Tensor, _linear(build, x, weight), residual)]


def _gated(build: Calls, x: Any, weight: Any) -> list[fx.Node]:
    both = _linear(build, x, weight)
    half = int(weight.meta["val"].shape[0]) // 2
    return [build.call(ops.glu, build.columns(both, 0, half), build.columns(both, half, 2 * half), "silu")]


def _gelu(build: Calls, x: Any, weight: Any, bias: Any) -> list[fx.Node]:
    return [build.call(aten.gelu.default, _linear(build, x, weight, bias))]


def _normed(build: Calls, x: Any, norm: Any, weight: Any) -> list[fx.Node]:
    return [_linear(build, build.call(ops.rms_norm, x, norm, 1e-6), weight)]


def _normed_gate(build: Calls, x: Any, norm: Any, weight: Any) -> list[fx.Node]:
    return _gated(build, build.call(ops.rms_norm, x, norm, 1e-6), weight)


def _token_parameters(build: Calls, scores: Any, values: Any) -> list[fx.Node]:
    """The second product of token-parameter attention: scores to a norm of length one, GELU, values (TokenFormer)."""
    length = build.call(aten.linalg_vector_norm.default, scores, 2, [-1], True)
    normed = build.call(aten.div.Tensor, scores, build.call(aten.clamp.default, length, 1e-12))
    scaled = build.call(aten.mul.Tensor, normed, float(scores.meta["val"].shape[-1]) ** 0.5)
    return [_linear(build, build.call(aten.gelu.default, scaled), values)]
