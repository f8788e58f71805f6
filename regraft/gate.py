"""Keeping a model's own runs and its captures apart: export replaces its weights and its ``forward`` meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


class Gate:
    """Many runs at a time, or one capture.

    A run waits for a capture. A capture does not wait for runs, but is turned away, so that no two threads can wait
    for each other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs: dict[int, int] = {}  # thread -> runs inside each other
        self._capturing: int | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The block runs the model."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._capturing in (None, me))
            self._runs[me] = self._runs.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._runs[me] -= 1
                if not self._runs[me]:
                    del self._runs[me]

    @contextmanager
    def capturing(self) -> Iterator[bool]:
        """The block may capture the model when it is given True; False while other threads run it."""
        me = threading.get_ident()
        with self._changed:
            before = self._capturing
            free = before in (None, me) and not self._runs.keys() - {me}
            if free:
                self._capturing = me
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._capturing = before
                    self._changed.notify_all()


#: One capture at a time in a process: export and what makes it faster change classes of PyTorch meanwhile.
CAPTURE = threading.RLock()
_GATES: WeakKeyDictionary[nn.Module, Gate] = WeakKeyDictionary()


def gate_of(model: nn.Module) -> Gate:
    """The gate of a model, the same for everything that was compiled from it."""
    with CAPTURE:
        return _GATES.setdefault(model, Gate())
