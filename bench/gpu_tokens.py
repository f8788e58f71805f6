"""The part "tokens" of ``make gpu``: vision transformers with fewer tokens beside the exact ones, in bf16.

The peer is the exact model with SDPA and ``torch.compile``, layer by layer, which is how it compiles in seconds. All
are timed as CUDA graphs, so that no row is about launching. What counts is the speed-up over the peer as a fraction of
what the multiplications that are saved would allow; and what a gate that measures would take, the reduced or the exact
model, must never be slower than the peer. Weights are random: only time is read, and that the lowered model computes
what its definition does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import regraft
from bench.gpu_rows import Outcome, Part, Row, Setting, captured, device_times
from bench.plain_models import PlainVit
from regraft.build import Toolchain
from regraft.codegen.triton.lower import lower
from regraft.codegen.triton.tuner import KernelTuner
from regraft.compiled import CompiledModule
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.verify import relative_l2
from regraft.passes.base import Pass
from regraft.passes.pipeline import default_pipeline
from regraft.passes.tokens.reduce import ReduceTokens

_REMOVED, _SHARE, _ERROR = 8, 0.9, 3e-2
_BATCHES = (8, 32, 1, 128)


@dataclass(frozen=True)
class _Size:
    """A vision transformer's layers, width and heads."""

    layers: int
    width: int
    heads: int


_SIZES = {"vit-b16": _Size(12, 768, 12), "vit-l16": _Size(24, 1024, 16)}


def rows(setting: Setting) -> dict[str, Row]:
    """Each model at each batch."""
    return {
        f"{name} x{batch}, r={_REMOVED}": partial(_row, size, batch)
        for batch in _BATCHES
        for name, size in _SIZES.items()
    }


def saved(size: _Size, tokens: int, removed: int) -> float:
    """How many times the multiplications of the reduced model the exact one has: of a layer ``4 n w^2`` in front of the
    reduction with ``2 n^2 w`` for attention, ``8 m w^2`` behind it."""

    def work(removed: int) -> float:
        total, left = 0.0, tokens
        for _ in range(size.layers):
            total += 4.0 * left * size.width**2 + 2.0 * left**2 * size.width
            left -= min(removed, (left - 1) // 2)
            total += 8.0 * left * size.width**2
        return total

    return work(0) / work(removed)


@cache
def _model(size: _Size, setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    sized = setting.pick(size, _Size(2, 32, 4))
    image, patch = setting.pick((224, 16), (32, 8))
    with torch.device(setting.device):
        model = PlainVit(sized.layers, sized.width, sized.heads, image, patch)
    return model.to(torch.bfloat16).eval()


def _row(size: _Size, batch: int, setting: Setting) -> Outcome:
    model = _model(size, setting)
    image, removed = setting.pick(224, 32), setting.pick(_REMOVED, 2)
    x = torch.randn(setting.pick(batch, 2), 3, image, image, device=setting.device, dtype=torch.bfloat16)
    exact, fewer = _compiled(model, x), _compiled(model, x, ReduceTokens(removed))
    kernels = sum(name.startswith("token_") for row in fewer.report.applications for name in row.new_nodes)
    error = relative_l2(exact(x), _without_gradient(model, x))
    runs: dict[str, Callable[[Tensor], Any]] = {"exact": exact, "fewer": fewer}
    if setting.on_gpu:
        runs["torch.compile"] = _by_layers(model)
    calls = {name: captured(name, partial(_without_gradient, run, x), setting) for name, run in runs.items()}
    times = device_times(calls, setting)
    figures: dict[str, Any] = {"error of the exact": error, "token kernels": kernels}
    figures |= {f"{name} ms": spent for name, spent in times.items()}
    sized = setting.pick(size, _Size(2, 32, 4))
    allowed = saved(sized, setting.pick(197, 17), removed)
    figures["multiplications saved"] = allowed
    right = error <= _ERROR and kernels == 2 * (sized.layers - 1)  # behind the last attention one token alone is read
    target = f"{_SHARE:.0%} of what is saved, never slower"
    if "torch.compile" not in times:
        return Outcome(figures, None if right else False, target)
    figures["torch.compile over fewer"] = times["torch.compile"] / times["fewer"]
    figures["exact over fewer"] = times["exact"] / times["fewer"]
    figures["share of what is saved"] = figures["torch.compile over fewer"] / allowed
    figures["torch.compile over what a gate takes"] = times["torch.compile"] / min(times["fewer"], times["exact"])
    met = {"tokens, never slower": right and figures["torch.compile over what a gate takes"] >= 1.0}
    if batch >= 8:
        met["tokens, share of what is saved"] = right and figures["share of what is saved"] >= _SHARE
    return Outcome(figures, all(met.values()), target, met)


#: What was measured of attention, as lines of records: the models of a part have the same sites.
_MEASURED: list[bytes] = [b""]


def _compiled(model: nn.Module, x: Tensor, *smaller: Pass) -> CompiledModule:
    """The compiled model; attentions that an earlier row measured are not measured again."""

    def lowered(program: Program, session: Session) -> Any:
        tuner = KernelTuner.of(program, session.target, _MEASURED[0])
        made = lower(program, session.log, tuner)
        _MEASURED[0] = tuner.to_lines()
        return made

    toolchain = Toolchain(pipeline=lambda target: default_pipeline(target, tokens=smaller), lower=lowered)
    return regraft.compile(model, (x,), target="cuda", verify="off", toolchain=toolchain)


def _by_layers(model: nn.Module) -> nn.Module:
    """The model with each of its layers compiled: they are alike, so one is."""
    torch._dynamo.reset()
    peer = _copy(model)
    for block in peer.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)
    return peer


def _copy(model: nn.Module) -> nn.Module:
    """The same weights in modules of their own."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _without_gradient(run: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.no_grad():
        return run(x)


TOKENS = Part("tokens", 70.0, rows)
