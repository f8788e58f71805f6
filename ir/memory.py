"""Memory of the process: giving back what the C library keeps of freed tensors or a file holds, and cycles."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

_PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4, which Python does not name
_WORTH_IT = 1 << 19  # bytes
_MAPPINGS = Path("/proc/self/maps")
_FROZEN_BY_PYTHON = 1000  # objects at most: 3.12 starts with some hundreds
_set_apart = False  # inside ``no_cycle_search``: to ask Python, which counts frozen objects, takes tens of milliseconds


@functools.cache
def _of_c(name: str) -> Callable[..., int] | None:
    """A function of the C library: ``malloc_trim`` is glibc's, ``madvise`` of systems like Unix; None without it."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return function


def give_back() -> None:
    """Return free pages of the heap to the system. Costs milliseconds: for the end of a phase, not for a hot path."""
    trim = _of_c("malloc_trim")
    if trim is not None:
        trim(0)


def page_out(tensor: Tensor) -> bool:
    """Where ``tensor`` is a view of a file, as a checkpoint that was mapped: ask the system to take its pages out of
    memory until somebody reads them again, and return True. Pages that were written to stay. Small tensors are left."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.nbytes < _WORTH_IT:
        return False
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if not _in_a_file(start, end):
        return False
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _of_c("madvise")
    if advise is None:
        return False
    return bool(advise(ctypes.c_void_p(first), ctypes.c_size_t(max(last - first, 0)), _PAGE_OUT) == 0)


def _in_a_file(start: int, end: int) -> bool:
    """Whether these addresses lie in one mapping of a file."""
    try:
        mappings = _MAPPINGS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    for mapping in mappings:  # "low-high permissions offset device inode path", in the order of addresses
        low, _, rest = mapping.partition("-")
        if int(rest[: rest.index(" ")], 16) > start:
            high, _, _, _, inode, *_ = rest.split(maxsplit=5)
            return int(low, 16) <= start and end <= int(high, 16) and inode != "0"
    return False


@contextlib.contextmanager
def no_cycle_search() -> Iterator[None]:
    """Python's search for reference cycles rests meanwhile. It visits every object that lives: while a graph grows,
    that makes each step take longer than the one before. ``drop_cycles`` looks at those that were made inside."""
    global _set_apart
    searched = gc.isenabled()
    gc.disable()
    outermost = not _set_apart
    freezes = outermost and gc.get_freeze_count() <= _FROZEN_BY_PYTHON  # else whoever froze them thaws them
    if freezes:
        gc.freeze()
    _set_apart = True
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        _set_apart = not outermost
        if searched:
            gc.enable()


def drop_cycles() -> None:
    """Let go of cycles that a phase has left, without a look at what was there before: an export leaves tens of
    thousands of objects, whose place the next phase can use. Does nothing outside ``no_cycle_search``."""
    if _set_apart:
        gc.collect()
