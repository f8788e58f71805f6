"""The rewrite that breaks a model is found by fuel, whether it is wrong or makes a later pass raise."""

from __future__ import annotations

import math

import torch

from regraft.ir.capture import capture
from regraft.passes.base import Pipeline
from regraft.tolerance import BY_TYPE
from regraft.trial import Bench
from tests.regraft.fixtures import RAISING, RIGHT, WRONG, Source


def bench(pipeline: Pipeline) -> Bench:
    source = Source()
    return Bench(capture(source.model, source.args, source.kwargs), pipeline)


def test_fuel_limits_the_rewrites_and_each_trial_starts_afresh() -> None:
    held = bench(WRONG)
    assert [held.run(number).session.applied for number in (0, 1, 2, 9)] == [0, 1, 2, 2]
    assert held.run(1).error == 0.0
    assert held.run(2).error > 0.1


def test_right_rewrites_leave_nothing_to_find() -> None:
    found = bench(RIGHT).bisect()
    assert found.turn is None and found.error == 0.0 and found.tolerance == BY_TYPE[torch.float32]


def test_a_wrong_rewrite_is_found() -> None:
    steps: list[int] = []
    found = bench(WRONG).bisect(advance=lambda: steps.append(1))
    assert found.turn is not None and found.application is not None
    assert (found.turn.number, found.application.rule) == (2, "sigmoid-is-tanh")
    assert found.turn.error_before == 0.0 < found.turn.error_after
    assert "fixtures.py" in found.application.user_line
    assert steps


def test_a_rewrite_that_makes_a_later_pass_raise_is_found() -> None:
    found = bench(RAISING).bisect()
    assert found.turn is not None and found.application is not None
    assert found.application.rule == "clamp-relu"
    assert found.turn.error_after == math.inf and found.failure == "KeyError: 'clamp'"


def test_a_wide_tolerance_lets_it_pass() -> None:
    assert bench(WRONG).bisect(tolerance=10.0).turn is None
