"""Binary search for the first bad step, over any function of the number of steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.bisect import first_bad


@given(st.integers(1, 200), st.data())
def test_the_first_bad_step_is_found_in_logarithmic_time(total: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(1, total))
    asked: list[int] = []

    def error_of(number: int) -> float:
        asked.append(number)
        return 1.0 if number >= culprit else 0.0

    turn = first_bad(error_of, total, tolerance=0.5)
    assert turn is not None and turn.number == culprit
    assert (turn.error_before, turn.error_after) == (0.0, 1.0)
    assert len(asked) == len(set(asked)) <= 3 + math.ceil(math.log2(total))


def test_nothing_is_found_when_all_steps_together_are_within() -> None:
    assert first_bad(lambda number: 0.1, 8, tolerance=0.5) is None


def test_a_start_that_is_bad_is_step_zero() -> None:
    turn = first_bad(lambda number: 2.0, 8, tolerance=0.5)
    assert turn is not None and turn.number == 0 and turn.error_after == 2.0


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_odd_errors_are_out_of_tolerance(odd: float) -> None:
    turn = first_bad(lambda number: odd if number >= 3 else 0.0, 5, tolerance=1.0)
    assert turn is not None and turn.number == 3


def test_no_steps_at_all() -> None:
    assert first_bad(lambda number: 0.0, 0, tolerance=0.0) is None
