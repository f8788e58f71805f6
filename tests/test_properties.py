"""Properties of the whole compiler over random graphs of the canonical operators."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.ir.driver import Fuel, Session
from regraft.ir.program import Program
from regraft.ir.verify import relative_l2
from regraft.passes.canonicalize.pipeline import canonicalize
from regraft.passes.pipeline import default_pipeline
from tests.ir.graphs import text
from tests.strategies import canonical_programs

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def results(program: Program) -> list[Tensor]:
    outputs: Any = program.callable()(*program.example)
    return list(outputs)


def agree(left: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_l2(a, b) <= tolerance or (a - b).abs().max() <= tolerance


@few
@given(canonical_programs(), st.sampled_from(["cpu", "cuda"]))
def test_rewritten_equals_original(program: Program, target: str) -> None:
    before = results(program)
    default_pipeline(target).run(program, session := Session())
    agree(results(program), before, 2e-5)
    assert not [refusal for refusal in session.log.refusals if refusal.kind == "rolled back"]


@few
@given(canonical_programs())
def test_unverified_rewriting_is_as_right(program: Program) -> None:
    """Rules are right by themselves; checking each application only proves it."""
    before = results(program)
    default_pipeline().run(program, Session(verify="off"))
    agree(results(program), before, 2e-5)


@few
@given(canonical_programs(), st.integers(0, 6))
def test_any_amount_of_fuel_leaves_a_right_program(program: Program, fuel: int) -> None:
    before = results(program)
    default_pipeline().run(program, session := Session(fuel=Fuel(fuel)))
    assert session.applied <= fuel
    agree(results(program), before, 2e-5)


@few
@given(canonical_programs())
def test_canonicalize_is_idempotent(program: Program) -> None:
    canonicalize(program, Session())
    once = text(program)
    canonicalize(program, session := Session())
    assert text(program) == once and session.applied == 0


@few
@given(canonical_programs())
def test_pipeline_comes_to_an_end_and_stays_there(program: Program) -> None:
    """A second run finds little: nothing undoes what the first did."""
    default_pipeline().run(program, first := Session())
    before = results(program)
    default_pipeline().run(program, second := Session())
    assert second.applied <= first.applied
    agree(results(program), before, 2e-5)


@few
@given(canonical_programs())
def test_a_copy_computes_the_same_bits(program: Program) -> None:
    twin = program.copy()
    assert all(torch.equal(a, b) for a, b in zip(results(program), results(twin), strict=True))
