"""Timing beside each other, with times that the test makes up."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.codegen.timing import best_in_turn


def test_the_least_of_several_rounds_counts_and_all_have_their_turn() -> None:
    times: dict[str, Iterator[float]] = {"a": iter([3e-6, 1e-6, 2e-6]), "b": iter([5e-6, 4e-6, 6e-6])}
    asked: list[str] = []

    def seconds(name: str) -> float:
        asked.append(name)
        return next(times[name])

    assert best_in_turn(times, seconds, limit=0.0) == {"a": 1e-6, "b": 4e-6}
    assert asked == ["a", "b"] * 3


def test_what_is_much_slower_is_not_measured_again() -> None:
    asked: list[str] = []

    def seconds(name: str) -> float:
        asked.append(name)
        return {"slow": 1.0, "fast": 0.1}[name]

    assert best_in_turn(["slow", "fast"], seconds, limit=0.0) == {"slow": 1.0, "fast": 0.1}
    assert asked == ["slow", "fast"] * 2  # nothing is left to be told apart
    assert best_in_turn([], seconds, limit=0.0) == {}


def test_a_slow_time_is_not_believed_before_another_is_like_it() -> None:
    """On a busy machine any call may take long: one that did, and was none the slower, has its turn again."""
    asked: list[str] = []
    given = {"disturbed": iter([9.0, 4.0, 0.5, 0.5, 0.5]), "steady": iter([1.0] * 5)}

    def seconds(name: str) -> float:
        asked.append(name)
        return next(given[name])

    assert best_in_turn(given, seconds, limit=10.0) == {"disturbed": 0.5, "steady": 1.0}
    assert asked == ["disturbed", "steady"] * 3


def test_measuring_ends_when_rounds_bring_nothing_new() -> None:
    asked: list[str] = []
    given = {"a": iter([5.0, 4.0, *[3.99] * 9]), "b": iter([4.5] * 11)}

    def seconds(name: str) -> float:
        asked.append(name)
        return next(given[name]) * 1e-6

    assert best_in_turn(given, seconds, limit=10.0) == {"a": 3.99e-6, "b": 4.5e-6}
    assert asked == ["a", "b"] * 5  # the second round was the last with news


def test_one_alone_is_measured_as_often_as_among_others() -> None:
    asked: list[str] = []

    def seconds(name: str) -> float:
        asked.append(name)
        return 1.0

    assert best_in_turn(["a"], seconds, limit=0.0) == {"a": 1.0}
    assert asked == ["a"] * 3
