"""The part "norms" of ``make gpu``: row-wise kernels beside the bandwidth of a copy, ``torch.compile``, Liger and vLLM.

A row's bytes are what its function must read and write, once. What counts is their rate over that of a copy of one GiB,
measured in the same row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_rows import Outcome, Part, Row, Setting, copy_bandwidth, device_times, offered
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.emit import emit_region
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.verify import relative_l2
from regraft.passes.pipeline import default_pipeline

_SHARE = 0.85
_EPS = 1e-6
_ERROR = 1.2e-2
Maker = Callable[[list[Tensor]], Callable[[], Any]]


class _Function(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> Any:
        """What the function gives."""
        return self.function(*operands)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Llama's modules write it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum with the residual stream, and its norm."""
    total = x + residual
    return rms_norm(total, weight), total


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum with the residual stream, and its norm."""
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, _EPS), total


def gate(x: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's activation."""
    return F.silu(x) * up


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A norm that a condition shifts and scales, as diffusion transformers have it."""
    return F.layer_norm(x, x.shape[-1:], None, None, _EPS) * (1 + scale) + shift


def geglu(x: Tensor, up: Tensor) -> Tensor:
    """GeGLU's activation."""
    return F.gelu(x, approximate="tanh") * up


@dataclass(frozen=True)
class _Case:
    """A function of ``tokens`` rows. ``operands``: "rows", "weight" or "sample" (a row for all tokens of a sample)."""

    function: Callable[..., Any]
    operands: tuple[str, ...]
    width: int
    peers: Mapping[str, Maker] = field(default_factory=dict)


def _liger(module: str, name: str, *more: Any) -> Maker:
    def make(given: list[Tensor]) -> Callable[[], Any]:
        function = getattr(import_module(f"liger_kernel.ops.{module}"), name)
        return lambda: function.apply(*given, *more)

    return make


def _vllm(name: str, arrange: Callable[[list[Tensor]], tuple[Any, ...]]) -> Maker:
    def make(given: list[Tensor]) -> Callable[[], Any]:
        import_module("vllm._custom_ops")
        function, arguments = getattr(torch.ops._C, name), arrange(given)
        return lambda: function(*arguments)

    return make


def _packed(given: list[Tensor]) -> tuple[Any, ...]:
    return torch.empty_like(given[0]), torch.cat(given, -1)


def _cases() -> dict[str, _Case]:
    """vLLM's residual norm writes over its operands: its numbers drift from call to call, its time does not."""
    rms = {
        "liger": _liger("rms_norm", "LigerRMSNormFunction", _EPS),
        "vllm": _vllm("rms_norm", lambda given: (torch.empty_like(given[0]), *given, _EPS)),
    }
    added = {
        "liger": _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction", _EPS),
        "vllm": _vllm("fused_add_rms_norm", lambda given: (given[0].clone(), given[1].clone(), given[2], _EPS)),
    }
    silu = {"liger": _liger("swiglu", "LigerSiLUMulFunction"), "vllm": _vllm("silu_and_mul", _packed)}
    gelu = {"liger": _liger("geglu", "LigerGELUMulFunction"), "vllm": _vllm("gelu_tanh_and_mul", _packed)}
    return {
        "residual, rms norm 4096": _Case(add_rms_norm, ("rows", "rows", "weight"), 4096, added),
        "residual, layer norm 4096": _Case(add_layer_norm, ("rows", "rows", "weight", "weight"), 4096),
        "gate silu 14336": _Case(gate, ("rows", "rows"), 14336, silu),
        "rms norm 4096": _Case(rms_norm, ("rows", "weight"), 4096, rms),
        "modulated norm 3072": _Case(modulated, ("rows", "sample", "sample"), 3072),
        "gate gelu 14336": _Case(geglu, ("rows", "rows"), 14336, gelu),
        "residual, rms norm 8192": _Case(add_rms_norm, ("rows", "rows", "weight"), 8192, added),
        "residual, layer norm 768": _Case(add_layer_norm, ("rows", "rows", "weight", "weight"), 768),
    }


def rows(setting: Setting) -> dict[str, Row]:
    """A row a function."""
    return {name: partial(_row, case) for name, case in _cases().items()}


def _row(case: _Case, setting: Setting) -> Outcome:
    given = _operands(case, setting)
    ours = _kernel(case, given)
    found, wanted = _listed(ours()), _listed(case.function(*(x.double() for x in given)))
    error = max(relative_l2(a.double(), b) for a, b in zip(found, wanted, strict=True))
    makers = {name: partial(make, given) for name, make in case.peers.items()} if setting.on_gpu else {}
    calls = {"regraft": ours, "eager": lambda: case.function(*given), **offered(makers)}
    if setting.on_gpu:
        compiled = torch.compile(case.function, dynamic=False)
        calls["torch.compile"] = lambda: compiled(*given)
    times = device_times(calls, setting)
    moved = sum(x.numel() * x.element_size() for x in (*given, *found))
    share = moved / (times["regraft"] * 1e-3) / copy_bandwidth(setting)
    figures: dict[str, Any] = {"error": error} | {f"{name} ms": spent for name, spent in times.items()}
    figures |= {"GB/s": moved / times["regraft"] * 1e-6, "share of the bandwidth of a copy": share}
    best = min((spent for name, spent in times.items() if name != "regraft"), default=float("nan"))
    figures["best peer over regraft"] = best / times["regraft"]
    met = {"norms": share >= _SHARE and error <= _ERROR} if setting.on_gpu else {}
    passed = met["norms"] if met else None if error <= _ERROR else False
    return Outcome(figures, passed, f"{_SHARE:.0%} of a copy's bandwidth", met)


def _operands(case: _Case, setting: Setting) -> list[Tensor]:
    samples, tokens = setting.pick((8, 2048), (2, 5))
    width = setting.pick(case.width, 24)
    sizes = {"rows": (samples, tokens, width), "weight": (width,), "sample": (samples, 1, width)}
    make = torch.Generator(setting.device).manual_seed(0)
    drawn = [torch.randn(sizes[kind], generator=make, device=setting.device) for kind in case.operands]
    return [x.to(torch.bfloat16) for x in drawn]


def _kernel(case: _Case, given: list[Tensor]) -> Callable[[], Any]:
    """The kernel of all that the function's graph does."""
    program = capture(_Function(case.function), tuple(given))
    default_pipeline("cuda").run(program, Session(verify="off"))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    outputs: Any = program.output_node.args[0]
    region = emit_region(calls, list(outputs), program.fake_mode)
    operator = load_kernel(region.kernel).operator
    values = dict(zip(program.user_inputs(), given, strict=True))
    operands = [values[node] for node in region.inputs]
    return lambda: operator(*operands)


def _listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


NORMS = Part("norms", 30.0, rows)
