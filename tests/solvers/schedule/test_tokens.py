"""Token schedules: the dynamic program finds what trying every schedule finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.schedule.errors import ScheduleError
from regraft.solvers.schedule.points import fastest, front
from regraft.solvers.schedule.tokens import TokenSchedule, TokenTable, solve_tokens


@st.composite
def tables(draw: st.DrawFn) -> TokenTable:
    """Two to four layers, up to eight tokens; times that fall with tokens or do not, losses of any shape."""
    layers, tokens = draw(st.integers(2, 4)), draw(st.integers(2, 8))
    removals = (0, *sorted(draw(st.sets(st.integers(1, 4), min_size=1, max_size=2))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    power = draw(st.sampled_from((1.0, 0.5)))
    loss = rng.integers(0, 9 if power == 1 else 4, (layers, tokens + 1, len(removals))) ** (1 / power)  # sums are exact
    loss[rng.random(loss.shape) < 0.2] = np.inf
    loss[:, :, 0] = 0.0
    return TokenTable(
        removals,
        rng.integers(1, 20, (layers, tokens + 1)).astype(float),
        rng.integers(0, 4, layers).astype(float),
        loss,
        base=float(rng.integers(0, 5)),
        power=power,
    )


def every_schedule(table: TokenTable) -> list[TokenSchedule]:
    found = (
        TokenSchedule(removed, *table.cost(removed))
        for removed in itertools.product(table.removals, repeat=table.layers)
    )
    return [schedule for schedule in found if math.isfinite(schedule.loss)]


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 30))
def test_the_front_is_that_of_all_schedules(table: TokenTable, limit: int) -> None:
    expected = front(schedule for schedule in every_schedule(table) if schedule.loss <= limit)
    found = solve_tokens(table, limit)
    assert [s.seconds for s in found.schedules] == [s.seconds for s in expected]
    assert [s.loss for s in found.schedules] == pytest.approx([s.loss for s in expected])
    assert all(table.cost(s.removed) == (pytest.approx(s.loss), s.seconds) for s in found.schedules)
    assert (found.stop, found.gap, found.bound) == ("optimal", 0.0, expected[-1].seconds)


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 30))
def test_with_few_labels_the_bound_still_holds(table: TokenTable, limit: int) -> None:
    best = fastest(every_schedule(table), limit)
    found = solve_tokens(table, limit, most_labels=2)
    made = fastest(found.schedules, limit)
    assert best is not None and made is not None
    assert found.bound <= best.seconds <= made.seconds
    assert found.gap == pytest.approx((made.seconds - found.bound) / made.seconds)
    assert found.stop == "labels" or made.seconds == best.seconds


def test_tokens_go_early_where_later_layers_are_slow_and_late_where_early_ones_are_sensitive() -> None:
    left = np.arange(9.0)
    slow_last, even = np.stack([left, left, 9 * left]), np.stack([left, left, left])
    flat = np.zeros((3, 9, 2))
    flat[:, :, 1] = 1.0
    early = solve_tokens(TokenTable((0, 4), slow_last, np.zeros(3), flat), limit=1.0).schedules[-1]
    assert early.removed == (4, 0, 0)
    sensitive = flat.copy()
    sensitive[0, :, 1] = 5.0
    late = solve_tokens(TokenTable((0, 4), even, np.zeros(3), sensitive), limit=1.0).schedules[-1]
    assert late.removed == (0, 4, 0)


def test_a_reduction_that_costs_more_than_it_saves_is_not_made() -> None:
    table = TokenTable((0, 2), np.tile(np.arange(9.0), (2, 1)), np.full(2, 100.0), np.zeros((2, 9, 2)))
    (only,) = solve_tokens(table, math.inf).schedules
    assert only.removed == (0, 0) and only.seconds == 16.0


def test_a_limit_of_zero_leaves_all_tokens_unless_removing_them_loses_nothing() -> None:
    loss = np.full((2, 5, 2), 1e-9)
    loss[:, :, 0] = 0.0
    table = TokenTable((0, 1), np.tile(np.arange(5.0), (2, 1)), np.zeros(2), loss)
    assert [s.removed for s in solve_tokens(table, 0.0).schedules] == [(0, 0)]
    free = TokenTable((0, 1), table.seconds, table.overhead, np.zeros_like(loss))
    assert solve_tokens(free, 0.0).schedules[-1].removed == (1, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"removals": (1, 2)}, "lack 0"),
        ({"overhead": np.zeros(3)}, "overhead has shape"),
        ({"loss": np.zeros((2, 4, 2))}, "loss has shape"),
        ({"loss": np.full((2, 5, 2), np.nan)}, "not a number"),
        ({"seconds": np.zeros(3)}, "seconds has shape"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, object], reason: str) -> None:
    good = {"removals": (0, 1), "seconds": np.zeros((2, 5)), "overhead": np.zeros(2), "loss": np.zeros((2, 5, 2))}
    with pytest.raises(ScheduleError, match=reason):
        TokenTable(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    table = TokenTable((0, 1), np.zeros((2, 5)), np.zeros(2), np.zeros((2, 5, 2)))
    with pytest.raises(ScheduleError, match="give 0 or more"):
        solve_tokens(table, limit)
