"""Giving memory back to the system: what the C library keeps of freed tensors counts as the process's own."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
