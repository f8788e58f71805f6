"""A trace as it lies on disk: which batches it has, and any of them read on their own, here or in another process.

What is larger than memory is read in pieces, and only their statistics are kept. Pieces hold the batches in the order
in which a trace in memory would be observed, so that the statistics are the same whatever the size of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.statistics import Limits, Statistics, aggregate
from regraft.solvers.placement.trace import Trace

#: Bytes of a piece; several times as much is in memory while it is observed.
PIECE_BYTES = 64 << 20


class Stored(Protocol):
    """A trace of any form. It is small whatever it stands for, and can be sent to another process."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The scenario of each batch."""

    @property
    def num_layers(self) -> int:
        """How many expert layers were recorded."""

    @property
    def size(self) -> int:
        """Bytes of all batches, uncompressed."""

    def read(self, numbers: Sequence[int]) -> Trace:
        """These batches in this order, without ``transitions``. Raises ``PlacementError`` for what is malformed."""

    def transitions(self) -> dict[str, NDArray[np.float64]]:
        """Transitions that the trace holds itself, as ``Trace.transitions``."""


@dataclass(frozen=True)
class Held:
    """A trace that is in memory already: of a form that cannot be read in parts."""

    trace: Trace

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The scenario of each batch."""
        return tuple(batch.scenario for batch in self.trace.batches)

    @property
    def num_layers(self) -> int:
        """How many expert layers were recorded."""
        return self.trace.num_layers

    @property
    def size(self) -> int:
        """Bytes of all batches."""
        return sum(batch.counts.nbytes for batch in self.trace.batches)

    def read(self, numbers: Sequence[int]) -> Trace:
        """These batches in this order."""
        return replace(self.trace, batches=tuple(self.trace.batches[n] for n in numbers), transitions={})

    def transitions(self) -> dict[str, NDArray[np.float64]]:
        """Transitions that the trace holds itself."""
        return self.trace.transitions


def whole_trace(stored: Stored) -> Trace:
    """All of it, in memory."""
    return replace(stored.read(range(len(stored.scenarios))), transitions=stored.transitions())


def observe_stored(
    stored: Stored,
    numbers: Sequence[int] | None = None,
    limits: Limits | None = None,
    executor: Executor | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Statistics:
    """Statistics of these batches (by default of all) in their order, a piece of about ``piece_bytes`` at a time.

    With an ``executor`` pieces are read and observed in parallel, by processes that must be able to open the file. The
    result is that of ``observe`` on the same batches in memory. Raises ``PlacementError``.
    """
    chosen = range(len(stored.scenarios)) if numbers is None else numbers
    each = max(1, stored.size // max(len(stored.scenarios), 1))
    count = max(1, piece_bytes // each)
    pieces = [partial(stored.read, chosen[start : start + count]) for start in range(0, len(chosen), count)]
    return aggregate(pieces, limits, executor, batches_per_piece=count, transitions=stored.transitions())
