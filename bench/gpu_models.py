"""The part "models" of ``make gpu``: whole models compiled for the device, beside themselves and ``torch.compile``.

A model passes when its outputs agree, attention was found and runs as a kernel, no rewrite was taken back, and it is
not slower than the best ``torch.compile``. Cold compile times stand beside; nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import regraft
from bench.decoder import PlainDecoder
from bench.gpu_rows import Outcome, Part, Row, Setting, device_times, tell_left_out
from regraft.ir.verify import relative_l2

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
_MODES = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}


def _encoder(setting: Setting) -> tuple[nn.Module, Tensor]:
    width, heads = setting.pick((768, 12), (32, 4))
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True, activation="gelu")
    layers, batch, length = setting.pick((12, 16, 512), (1, 2, 9))
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), torch.randn(batch, length, width)


def _decoder(setting: Setting) -> tuple[nn.Module, Tensor]:
    hidden, heads, kv_heads, layers = setting.pick((2048, 16, 4, 8), (32, 4, 2, 1))
    model = PlainDecoder(layers, hidden=hidden, heads=heads, kv_heads=kv_heads)
    return model, torch.randint(0, 256, setting.pick((4, 2048), (2, 9)))


MODELS: dict[str, Callable[[Setting], tuple[nn.Module, Tensor]]] = {"encoder": _encoder, "decoder": _decoder}


@dataclass(frozen=True)
class _Compiled:
    run: Callable[[Tensor], Any]
    seconds: float


def rows(setting: Setting) -> dict[str, Row]:
    """Each model in two element types."""
    return {f"{name} {dtype}": partial(_row, name, dtype) for dtype in ("bfloat16", "float32") for name in MODELS}


def _row(name: str, dtype_name: str, setting: Setting) -> Outcome:
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, dtype_name)
    model, x = MODELS[name](setting)
    model = model.to(setting.device, dtype).eval()
    x = x.to(setting.device, dtype) if x.is_floating_point() else x.to(setting.device)
    fast, compiled = _regraft(model, x)
    with torch.no_grad():
        error = relative_l2(fast(x), model(x))
    peers = _peers(model, x) if setting.on_gpu else {}
    runs: dict[str, Callable[[Tensor], Any]] = {"model": model, "regraft": fast}
    runs |= {label: peer.run for label, peer in peers.items()}
    times = device_times({label: partial(_call, run, x) for label, run in runs.items()}, setting, rounds=9)
    report = fast.report
    kernels = report.statistics["attention-kernel"].fired if "attention-kernel" in report.statistics else 0
    undone = [refusal.reason for refusal in report.refusals if refusal.kind == "rolled back"]
    figures: dict[str, Any] = {"error": error, "attention kernels": kernels, "regraft compile s": compiled}
    figures |= {f"{label} ms": milliseconds for label, milliseconds in times.items()}
    figures |= {f"{label} compile s": peer.seconds for label, peer in peers.items()}
    fastest = min((times[label] for label in peers if label in times), default=None)
    if fastest is not None:
        figures["best torch.compile over regraft"] = fastest / times["regraft"]
    right = error <= TOLERANCE[dtype_name] and kernels > 0 and not undone
    return Outcome(figures, right and (fastest is None or fastest >= times["regraft"]), "as exact, and as fast")


def _regraft(model: nn.Module, x: Tensor) -> tuple[Any, float]:
    started = time.perf_counter()
    fast = regraft.compile(model, (x,), target="cuda")
    fast(x)
    return fast, time.perf_counter() - started


def _peers(model: nn.Module, x: Tensor) -> dict[str, _Compiled]:
    """``torch.compile`` in its modes, each with the seconds of its first call; a mode that fails is left out, and
    stderr says why."""
    found: dict[str, _Compiled] = {}
    torch._dynamo.reset()
    for label, mode in _MODES.items():
        run = torch.compile(model, mode=mode)
        started = time.perf_counter()
        try:
            _call(run, x)
            torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError) as error:
            tell_left_out(label, error)
            continue
        found[label] = _Compiled(run, time.perf_counter() - started)
    return found


def _call(run: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.no_grad():
        run(x)


MODELS_PART = Part("models", 140.0, rows)
