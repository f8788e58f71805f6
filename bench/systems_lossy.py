"""The lossy passes over attention, one knob each, on decoders with random weights: what they cost and save.

How much of a trained model they keep, beside choosing at random, is for ``bench.attention_quality`` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.decoder import DecodeStep, PlainDecoder
from bench.systems_cases import HEADS, LENGTH, WIDTH
from regraft.codegen.cpu.executable import Executable
from regraft.codegen.cpu.lower import lower
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.attention.drop_heads import DropHeads
from regraft.passes.attention.in_context import InContextVectors
from regraft.passes.attention.prepend import PrependToken
from regraft.passes.attention.profile import profile_heads
from regraft.passes.attention.restrict import RestrictHeads
from regraft.passes.attention.specialise import SpecialiseHeads
from regraft.passes.attention.tidal import TidalDecode
from regraft.passes.base import Pass
from regraft.passes.pipeline import finishing, recognising

LAYERS, LONG, CACHED = 4, 4096, 8192
_WINDOW, _SINKS = 256, 4
Model = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Reduction:
    """A model with inputs, the passes that reduce it, and what the knob is set to."""

    model: Callable[[], Model]
    passes: Callable[[Program], list[Pass]]
    knob: str


def programs(reduction: Reduction) -> tuple[Executable, Executable, tuple[Tensor, ...]]:
    """The unreduced and the reduced model, lowered, and their inputs."""
    model, inputs = reduction.model()
    program, session = capture(model.eval(), inputs), Session(verify="off")
    recognising().run(program, session)
    full = program.copy()
    for item in reduction.passes(program):
        if not item.run(program, session):
            raise RuntimeError(f"{item.name} changed nothing: {session.log.refusals[-1:]}")
    for one in (full, program):
        finishing().run(one, session)
    return lower(full), lower(program), inputs


def prefill(length: int) -> Callable[[], Model]:
    """A decoder over ``length`` tokens."""

    def make() -> Model:
        torch.manual_seed(0)
        return PlainDecoder(LAYERS, WIDTH, HEADS, HEADS), (torch.randint(0, 256, (1, length)),)

    return make


def decode() -> Model:
    """One token behind long caches."""
    torch.manual_seed(0)
    model = PlainDecoder(LAYERS, WIDTH, HEADS, HEADS)
    caches = (torch.randn(LAYERS, 1, HEADS, CACHED, WIDTH // HEADS) for _ in range(2))
    return DecodeStep(model), (torch.randint(0, 256, (1, 1)), *caches)


def _least_heads(program: Program) -> list[Pass]:
    profiles = profile_heads(program, _WINDOW, _SINKS)
    ordered = [sorted(range(HEADS), key=lambda head, norm=p.norm: norm[head]) for p in profiles]  # type: ignore[misc]
    return [DropHeads(place, tuple(sorted(heads[: HEADS // 4]))) for place, heads in enumerate(ordered)]


def _vectors() -> Any:
    return torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(3))


LOSSY: dict[str, Reduction] = {
    "StreamingLLM": Reduction(
        prefill(LONG),
        lambda program: [RestrictHeads(place, _WINDOW, _SINKS) for place in range(LAYERS)],
        f"{_SINKS} sinks and a window of {_WINDOW} of {LONG}",
    ),
    "dormant heads": Reduction(prefill(LENGTH), _least_heads, f"{HEADS // 4} of {HEADS} heads dropped"),
    "head specialisation": Reduction(
        prefill(LONG), lambda program: [SpecialiseHeads(2048, _SINKS, 0.8)], f"a window of 2048 of {LONG}, coverage 0.8"
    ),
    "Token Prepending": Reduction(prefill(LENGTH), lambda program: [PrependToken(0, 1, 3)], "layers 1 to 3"),
    "in-context vectors": Reduction(
        prefill(LENGTH), lambda program: [InContextVectors(_vectors(), 0.1)], "strength 0.1"
    ),
    "TidalDecode": Reduction(decode, lambda program: [TidalDecode(256, 1)], f"256 of {CACHED} keys behind layer 1"),
}
