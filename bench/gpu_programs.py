"""Rows of the part "tests" of ``make gpu`` that need a GPU beyond a kernel: choice by measurement, artifacts that come
from a CPU, CUDA graphs.

Each compiles a small model and compares it with the model in fp64. On a CPU they are rehearsed: nothing is measured
or recorded there, and the rows say so by having no verdict.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regraft
from bench.gpu_rows import Outcome, Row, Setting
from regraft.codegen.triton.tuning_records import from_lines
from regraft.ir.verify import relative_l2

_HEADS, _DIM, _WINDOW = 4, 64, 100
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def program_rows() -> dict[str, Row]:
    """The rows by name."""
    masks = ("window", "padding")
    return {
        **{f"program: choice of {mask} attention": partial(_choice, mask) for mask in masks},
        "program: an artifact from a CPU": _from_a_cpu,
        "program: a CUDA graph": _graph,
    }


class Attention(nn.Module):
    """Self-attention under a mask."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, width = mask, _HEADS * _DIM
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """``x`` ``[batch, length, width]``, ``present`` ``[batch, length]``: the tokens that are no padding."""
        query, key, value = (part.unflatten(-1, (_HEADS, _DIM)).transpose(1, 2) for part in self.packed(x).chunk(3, -1))
        places = torch.arange(x.shape[1], device=x.device)
        seen = places[:, None] >= places
        if self.mask == "window":
            seen = seen & (places[:, None] - places < _WINDOW)
        if self.mask == "padding":
            seen = seen & present[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, seen)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _case(mask: str, dtype: torch.dtype, device: str, setting: Setting) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = Attention(mask).to(dtype).to(device).eval()
    return model, _inputs(dtype, device, setting, 0)


def _inputs(dtype: torch.dtype, device: str, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    length = setting.pick(500, 30)
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, _HEADS * _DIM, generator=make).to(dtype).to(device)
    present = torch.ones(2, length, dtype=torch.bool)
    present[1, length // 2 :] = False
    return x, present.to(device)


def _error(found: Tensor, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> float:
    wide = Attention(str(model.mask)).double().eval()
    wide.load_state_dict({name: value.cpu().double() for name, value in model.state_dict().items()})
    x, present = (value.cpu() for value in inputs)
    with torch.no_grad():
        return relative_l2(found.cpu().double(), wide(x.double(), present))


def _choice(mask: str, setting: Setting) -> Outcome:
    """Compiled where candidates can be measured: the output, the choice, and times of all that ran."""
    dtype = setting.pick(torch.bfloat16, torch.float32)
    model, inputs = _case(mask, dtype, setting.device, setting)
    fast = regraft.compile(model, inputs, target="cuda")
    error = _error(fast(*inputs), model, inputs)
    figures: dict[str, Any] = {"error": error}
    executable: Any = fast.entries[0].executable
    records = from_lines(executable.tuning)
    for record in records:
        figures["choice"] = record.choice
        figures |= {f"{name} ms": 1e3 * seconds for name, seconds in record.seconds.items()}
        figures |= {f"{name} left out": reason for name, reason in record.left_out.items()}
    measured = bool(records) or not setting.on_gpu
    return Outcome(figures, error <= _TOLERANCE[dtype] and measured, f"measured, error at most {_TOLERANCE[dtype]:g}")


def _from_a_cpu(setting: Setting) -> Outcome:
    """Compiled and saved on the CPU, loaded onto the device that is found."""
    model, inputs = _case("window", torch.float32, "cpu", setting)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.regraft"
        regraft.compile(model, inputs, target="cuda").save(path)
        loaded = regraft.load(path)
    found = loaded(*(value.to(setting.device) for value in inputs))
    error = _error(found, model, inputs)
    passed = error <= _TOLERANCE[torch.float32] and found.device.type == torch.device(setting.device).type
    return Outcome({"error": error, "device": str(found.device)}, passed, "on the device that is here")


def _graph(setting: Setting) -> Outcome:
    """Three calls of a recorded model, each with inputs of its own."""
    dtype = setting.pick(torch.float16, torch.float32)
    model, inputs = _case("causal", dtype, setting.device, setting)
    fast = regraft.compile(model, inputs, target="cuda", cuda_graphs=True)
    errors = []
    for seed in range(3):
        given = _inputs(dtype, setting.device, setting, seed)
        errors.append(_error(fast(*given), model, given))
    told = [event.reason for event in fast.report.events if event.kind == "cuda graph"]
    recorded = not told or not setting.on_gpu
    passed = max(errors) <= _TOLERANCE[dtype] and recorded
    return Outcome({"error": max(errors), "not recorded": "; ".join(told)}, passed, "recorded, and right at each call")
