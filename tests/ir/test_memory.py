"""The search for cycles: it rests, and comes back however the work ends."""

from __future__ import annotations

import gc
import weakref

import pytest

from regraft.ir import memory
from regraft.ir.memory import drop_cycles, give_back, no_cycle_search


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


class Ring:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.own = self


def test_cycles_made_inside_are_dropped_and_older_ones_left() -> None:
    gc.collect()
    older = weakref.ref(Ring())
    with no_cycle_search():
        newer = weakref.ref(Ring())
        drop_cycles()
        assert newer() is None
        assert older() is not None
    gc.collect()
    assert older() is None
    assert gc.get_freeze_count() == 0


def test_outside_nothing_is_searched_for() -> None:
    gc.disable()
    try:
        ring = weakref.ref(Ring())
        drop_cycles()
        assert ring() is not None
    finally:
        gc.enable()


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with no_cycle_search():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
