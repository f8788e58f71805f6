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
    assert asked.count("slow") == 1 and asked.count("fast") == 3
    assert best_in_turn([], seconds, limit=0.0) == {}
