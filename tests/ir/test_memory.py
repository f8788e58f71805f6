"""The search for cycles: it rests, and comes back however the work ends."""

from __future__ import annotations

import gc

import pytest

from regraft.ir import memory
from regraft.ir.memory import give_back, no_cycle_search


def test_the_search_rests_and_comes_back() -> None:
    assert gc.isenabled()
    with no_cycle_search():
        assert not gc.isenabled()
        with no_cycle_search():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_comes_back_after_a_failure() -> None:
    with pytest.raises(ValueError, match="any"), no_cycle_search():
        raise ValueError("any")
    assert gc.isenabled()


def test_whoever_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with no_cycle_search():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_memory_is_given_back_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def trim(kept: int) -> int:
        asked.append(kept)
        return 1

    monkeypatch.setattr(memory, "_trim", lambda: trim)
    give_back()
    assert asked == [0]
    monkeypatch.setattr(memory, "_trim", lambda: None)
    give_back()
    assert asked == [0]
