"""The part "models" of ``make gpu``: whole models compiled for the device, beside themselves and ``torch.compile``.

A model passes when its outputs agree, attention was found, no rewrite was taken back, it is not slower than
``torch.compile(mode="max-autotune")``, and was compiled in a fifth of its time at most. Each row has a process and
caches of its own, so that both compile cold. Both record CUDA graphs, ``max-autotune`` by itself and regraft by
``cuda_graphs=True``. Nothing is downloaded; weights are random.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regraft
from bench.decoder import PlainDecoder
from bench.gpu_rows import Outcome, Part, Row, Setting, device_times, tell_left_out
from bench.plain_models import PlainBert, PlainExpertLayer, PlainVit
from regraft.ir.verify import relative_l2

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
_MODE = "max-autotune"
_COLD = 5.0
Inputs = tuple[Tensor, ...]


def _vit(large: bool, setting: Setting) -> tuple[nn.Module, Inputs]:
    layers, width, heads = setting.pick((24, 1024, 16) if large else (12, 768, 12), (1, 32, 4))
    size, patch = setting.pick((224, 16), (16, 8))
    return PlainVit(layers, width, heads, size, patch), (torch.randn(setting.pick(32, 2), 3, size, size),)


def _bert(setting: Setting) -> tuple[nn.Module, Inputs]:
    layers, width, heads = setting.pick((12, 768, 12), (1, 32, 4))
    batch, length = setting.pick((32, 512), (2, 9))
    there = torch.arange(length) < torch.linspace(length / 2, length, batch)[:, None].long()
    return PlainBert(layers, width, heads, length), (torch.randint(0, 30522, (batch, length)), there)


def _decoder(setting: Setting) -> tuple[nn.Module, Inputs]:
    """Layers as a model of eight billion weights has them."""
    hidden, heads, kv_heads, inner, layers = setting.pick((4096, 32, 8, 14336, 4), (32, 4, 2, 48, 1))
    model = PlainDecoder(layers, hidden, heads, kv_heads, inner)
    return model, (torch.randint(0, 256, setting.pick((2, 2048), (2, 9))),)


def _mixtral(setting: Setting) -> tuple[nn.Module, Inputs]:
    width, heads, kv_heads, experts, inner = setting.pick((4096, 32, 8, 8, 14336), (32, 4, 2, 3, 48))
    model = PlainExpertLayer(width, heads, kv_heads, experts, inner)
    return model, (torch.randn(*setting.pick((2, 2048), (2, 9)), width),)


#: Those that say most come first: a part that is cut off goes on there.
MODELS: dict[str, Callable[[Setting], tuple[nn.Module, Inputs]]] = {
    "vit-b16 x32": partial(_vit, False),
    "decoder of 8b, 4 layers, 2x2048": _decoder,
    "mixtral layer, 2x2048": _mixtral,
    "bert-base 32x512": _bert,
    "vit-l16 x32": partial(_vit, True),
}


@dataclass(frozen=True)
class _Compiled:
    run: Callable[..., Any]
    seconds: float


def rows(setting: Setting) -> dict[str, Row]:
    """Each model in bf16."""
    return {name: partial(_row, name, "bfloat16") for name in MODELS}


def _row(name: str, dtype_name: str, setting: Setting) -> Outcome:
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, dtype_name)
    with torch.device(setting.device):  # weights are drawn there, in no time
        model, inputs = MODELS[name](setting)
    model = model.to(dtype).eval()
    given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    with _cold_caches():
        fast = _regraft(model, given)
    with torch.no_grad():
        error = relative_l2(fast.run(*given), model(*given))
    with _cold_caches():
        peer = _peer(model, given) if setting.on_gpu else None
    runs: dict[str, Callable[..., Any]] = {"model": model, "regraft": fast.run}
    calls = {label: partial(_call, run, given) for label, run in runs.items()}
    if peer is not None:
        calls[f"torch.compile {_MODE}"] = partial(_call, peer.run, given)
    times = device_times(calls, setting, rounds=9)
    return _judged(fast, error, dtype_name, peer, times)


def _judged(fast: _Compiled, error: float, dtype_name: str, peer: _Compiled | None, times: dict[str, float]) -> Outcome:
    report: Any = fast.run.report  # type: ignore[attr-defined]
    undone = [refusal.reason for refusal in report.refusals if refusal.kind == "rolled back"]
    figures: dict[str, Any] = {"error": error, "attentions": report.recognized.get("attention", 0)}
    figures |= {"experts": report.recognized.get("moe", 0), "regraft compile s": fast.seconds}
    figures |= {f"{label} ms": milliseconds for label, milliseconds in times.items()}
    right = error <= TOLERANCE[dtype_name] and figures["attentions"] > 0 and not undone
    target = f"as exact as {_MODE}, as fast, compiled in a fifth of its time"
    theirs = times.get(f"torch.compile {_MODE}")
    if peer is None or theirs is None:
        return Outcome(figures, right, target)
    figures |= {f"{_MODE} compile s": peer.seconds, f"{_MODE} over regraft": theirs / times["regraft"]}
    figures["compile time of torch.compile over regraft's"] = peer.seconds / fast.seconds
    met = {"models": theirs >= times["regraft"] and right, "cold compile": peer.seconds >= _COLD * fast.seconds}
    return Outcome(figures, all(met.values()), target, met)


@contextmanager
def _cold_caches() -> Iterator[None]:
    """What compilers keep on disk is kept elsewhere, and is gone afterwards."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {name: str(Path(folder) / name.lower()) for name in names}
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _regraft(model: nn.Module, given: Inputs) -> _Compiled:
    started = time.perf_counter()
    fast = regraft.compile(model, given, target="cuda", cuda_graphs=True)
    fast(*given)
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return _Compiled(fast, time.perf_counter() - started)


def _peer(model: nn.Module, given: Inputs) -> _Compiled | None:
    """``torch.compile`` with the seconds of its first call; None where it fails, and the row says why."""
    run = torch.compile(model, mode=_MODE)
    started = time.perf_counter()
    try:
        _call(run, given)
        torch.cuda.synchronize()
    except Exception as error:  # whatever its compiler raises
        tell_left_out(f"torch.compile {_MODE}", error)
        return None
    return _Compiled(run, time.perf_counter() - started)


def _call(run: Callable[..., Any], given: Inputs) -> Any:
    with torch.no_grad():
        return run(*given)


MODELS_PART = Part("models", 145.0, rows, apart=True)
