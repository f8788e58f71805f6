"""Reduced programs lowered to the CPU compute what the definition does, as one run of native calls."""

from __future__ import annotations

import pytest

from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.native_operators import merge_native, plan_native, unmerge_native
from regraft.codegen.cpu.segments import run_segment
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.passes.pipeline import default_pipeline
from regraft.passes.tokens.reduce import ReduceTokens
from tests.codegen.cpu.support import needs_native
from tests.passes.tokens.models import IMAGE_KINDS, images, outputs, relative, texts, tiny
from tests.passes.tokens.test_reduce import ClassToken, MeanOfTokens


@pytest.mark.parametrize("kind", ["vit", "beit", "bert", "modernbert"])
def test_a_reduced_program_computes_the_same_lowered(kind: str) -> None:
    image = kind in IMAGE_KINDS
    model = ClassToken(tiny(kind)) if image else MeanOfTokens(tiny(kind))
    program = capture(model, tuple((images() if image else texts()).values()))
    default_pipeline("cpu", tokens=(ReduceTokens(2),)).run(program, Session(verify="off"))
    assert relative(lower(program)(*program.example)[0], outputs(program)[0]) <= 1e-5


@pytest.mark.parametrize("method", ["tome-stream", "pitome", "evit", "prune-flow", "dart", "divprune"])
def test_every_kind_of_method_can_be_lowered(method: str) -> None:
    program = capture(ClassToken(tiny("vit")), tuple(images().values()))
    default_pipeline("cpu", tokens=(ReduceTokens(3, method),)).run(program, Session(verify="off"))
    assert relative(lower(program)(*program.example)[0], outputs(program)[0]) <= 1e-5


class Native(Tuner):
    """Takes native kernels, measured or not."""

    def choose(self, *given: object) -> str:
        return "native"

    def choose_attention(self, *given: object) -> str:
        return "native"


@needs_native
def test_the_reduced_encoder_is_one_run_of_native_calls() -> None:
    """What lies between native calls would cost more than a plan."""
    program = capture(tiny("vit"), (), images())
    default_pipeline("cpu", tokens=(ReduceTokens(3),)).run(program, Session(verify="off"))
    lowered = lower(program, Native())
    targets = [node.target for node in lowered.module.graph.nodes]
    assert targets.count(plan_native) == targets.count(merge_native) == 3 and targets.count(unmerge_native) == 1
    made = lowered._function.func.__self__.graph  # type: ignore[attr-defined]
    assert sum(node.target is run_segment for node in made.nodes) == 1
