"""Memory of the process: giving back what the C library keeps of freed tensors, and when to look for cycles."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None where the C library has none."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return function


def give_back() -> None:
    """Return free pages of the heap to the system. Costs milliseconds: for the end of a phase, not for a hot path."""
    trim = _trim()
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def no_cycle_search() -> Iterator[None]:
    """Python's search for reference cycles rests meanwhile. It visits every object that lives: while a graph grows,
    that makes each step take longer than the one before. ``drop_cycles`` looks at those that were made inside."""
    searched = gc.isenabled()
    gc.disable()
    apart = gc.get_freeze_count() == 0  # else whoever froze them thaws them
    if apart:
        gc.freeze()
    try:
        yield
    finally:
        if apart:
            gc.unfreeze()
        if searched:
            gc.enable()


def drop_cycles() -> None:
    """Let go of cycles that a phase has left, without a look at what was there before: an export leaves tens of
    thousands of objects, whose place the next phase can use. Does nothing outside ``no_cycle_search``."""
    if gc.get_freeze_count():
        gc.collect()
