"""The search for cycles rests, and comes back however the work ends; memory that a file can give again is let go."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.ir import memory
from regraft.ir.memory import drop_cycles, give_back, no_cycle_search, page_out


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

    monkeypatch.setattr(memory, "_of_c", lambda name: trim)
    give_back()
    assert asked == [0]
    monkeypatch.setattr(memory, "_of_c", lambda name: None)
    give_back()
    assert asked == [0]


class Ring:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.own = self


def test_cycles_made_inside_are_dropped_and_older_ones_left() -> None:
    gc.collect()
    of_python = gc.get_freeze_count()
    older = weakref.ref(Ring())
    with no_cycle_search():
        newer = weakref.ref(Ring())
        drop_cycles()
        assert newer() is None
        assert older() is not None
    gc.collect()
    assert older() is None
    assert gc.get_freeze_count() == of_python


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


def saved(tmp_path: Path, tensor: Tensor) -> Tensor:
    """The tensor, read from a file that is mapped."""
    save_file({"weight": tensor}, tmp_path / "weights.safetensors")
    return load_file(tmp_path / "weights.safetensors")["weight"]


def pages(tensor: Tensor) -> int:
    """Bytes of a tensor's mapping that are in memory."""
    place, found = tensor.data_ptr(), -1
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(part, 16) for part in words[0].split("-"))
            found = 0 if low <= place < high else -1
        elif found == 0 and words[0] == "Rss:":
            return int(words[1]) << 10
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_a_mapped_weight_leaves_memory_until_it_is_read_again(tmp_path: Path) -> None:
    weight = saved(tmp_path, torch.arange(1 << 20, dtype=torch.float32))
    total = weight.double().sum()
    assert pages(weight) >= weight.nbytes
    assert page_out(weight)
    assert pages(weight) < weight.nbytes / 2
    assert weight.double().sum() == total


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_what_was_written_to_a_mapped_weight_stays(tmp_path: Path) -> None:
    weight = saved(tmp_path, torch.zeros(1 << 20))
    weight += 3
    page_out(weight)
    assert bool((weight == 3).all())


def test_only_large_weights_of_a_file_are_taken_out(tmp_path: Path) -> None:
    assert not page_out(torch.zeros(1 << 20))
    assert not page_out(saved(tmp_path, torch.zeros(8)))
    assert not page_out(torch.zeros(0))
