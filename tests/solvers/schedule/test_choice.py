"""The joint choice: the integer program finds what trying every choice finds."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.schedule.choice import Choice, Option, Sites, choose, curve
from regraft.solvers.schedule.errors import ScheduleError


@st.composite
def problems(draw: st.DrawFn) -> Sites:
    """One to four sites of one to three options, some of which cannot go together."""
    numbers = st.integers(0, 12)
    options = {
        f"site {site}": tuple(
            Option(f"option {place}", float(draw(numbers)), float(draw(st.integers(-12, 4))))
            for place in range(draw(st.integers(1, 3)))
        )
        for site in range(draw(st.integers(1, 4)))
    }
    picks = [(site, option.name) for site, held in options.items() for option in held]
    pairs = [(a, b) for a, b in itertools.combinations(picks, 2) if a[0] != b[0]]
    conflicts = draw(st.lists(st.sampled_from(pairs), max_size=3)) if pairs else []
    return Sites(options, 100.0, tuple(conflicts))


def best_by_trying(sites: Sites, limit: float) -> float:
    """The least time over all choices."""
    names = [[None, *options] for options in sites.options.values()]
    best = sites.base
    for picks in itertools.product(*names):
        made = {(site, option.name): option for site, option in zip(sites.options, picks, strict=True) if option}
        if any(first in made and second in made for first, second in sites.conflicts):
            continue
        if sum(option.loss for option in made.values()) <= limit:
            best = min(best, sites.base + sum(option.seconds for option in made.values()))
    return best


def is_legal(sites: Sites, choice: Choice) -> bool:
    picks = set(choice.picks.items())
    return not any(first in picks and second in picks for first, second in sites.conflicts)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 30))
def test_the_choice_is_the_best_of_all(sites: Sites, limit: int) -> None:
    found = choose(sites, limit)
    assert found.loss <= limit and is_legal(sites, found)
    assert found.seconds == pytest.approx(best_by_trying(sites, limit))
    assert (found.stop, found.bound, found.gap) == ("optimal", found.seconds, 0.0)


def test_of_two_options_that_exclude_each_other_one_is_taken() -> None:
    both = Sites(
        {"window": [Option("256", 0.1, -3.0)], "heads": [Option("drop", 0.1, -2.0)]},
        10.0,
        ((("window", "256"), ("heads", "drop")),),
    )
    assert choose(both, 1.0).picks == {"window": "256"}
    assert choose(Sites(both.options, 10.0), 1.0).picks == {"window": "256", "heads": "drop"}


def test_losses_far_below_a_solvers_tolerance_still_count() -> None:
    sites = Sites({name: [Option("on", 0.6e-9, -1.0)] for name in "ab"}, 10.0)
    assert choose(sites, 1e-9).seconds == 9.0
    assert choose(sites, 1.2e-9).seconds == 8.0


def test_without_time_nothing_is_changed() -> None:
    sites = Sites({"a": [Option("on", 0.0, -1.0)]}, 10.0)
    found = choose(sites, 1.0, time_limit=0.0)
    assert (found.picks, found.seconds, found.stop) == ({}, 10.0, "time limit")
    assert found.bound == 9.0 and found.gap == pytest.approx(0.1)


def test_the_curve_falls_and_its_ends_are_those_of_the_limits() -> None:
    sites = Sites({name: [Option("on", loss, -loss)] for name, loss in (("a", 1.0), ("b", 2.0), ("c", 4.0))}, 10.0)
    points = curve(sites, [0.0, 1.0, 3.0, 3.5, 7.0])
    assert [(point.loss, point.seconds) for point in points] == [(0, 10), (1, 9), (3, 7), (7, 3)]


@pytest.mark.parametrize(
    ("options", "conflicts", "reason"),
    [
        ({"a": [Option("x", -1.0, 0.0)]}, (), "a loss of 0 or more"),
        ({"a": [Option("x", math.nan, 0.0)]}, (), "a loss of 0 or more"),
        ({"a": [Option("x", 0.0, math.inf)]}, (), "a finite time"),
        ({"a": [Option("x", 0.0, 0.0)] * 2}, (), "the same name"),
        ({"a": [Option("x", 0.0, 0.0)]}, ((("a", "x"), ("b", "y")),), "which no site has"),
    ],
)
def test_problems_that_make_no_sense_are_refused(
    options: dict[str, list[Option]], conflicts: tuple[tuple[tuple[str, str], tuple[str, str]], ...], reason: str
) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Sites(options, 1.0, conflicts)


@pytest.mark.parametrize("limit", [-0.5, math.nan])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ScheduleError, match="give 0 or more"):
        choose(Sites({"a": [Option("x", 0.0, -1.0)]}, 1.0), limit)
