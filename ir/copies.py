"""Counting the token copies that dispatch sends, for tests and for whoever compares a plan's prediction with what
happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dispatched:
    """One call of ``regraft::moe_dispatch``: this ``rank`` had ``sent[r]`` rows for rank ``r`` in expert layer
    ``layer``; those for itself do not leave it. ``chosen [tokens, top_k]`` are the experts that its tokens asked for,
    what a prediction is made from."""

    layer: int
    rank: int
    sent: tuple[int, ...]
    chosen: Tensor

    @property
    def crossing(self) -> int:
        """Copies that left the rank."""
        return sum(self.sent) - self.sent[self.rank]


@dataclass
class CopyCount:
    """What this process dispatched while it counted, in the order of the calls."""

    calls: list[Dispatched] = field(default_factory=list)

    @property
    def crossing(self) -> int:
        """Copies that left this rank in all calls."""
        return sum(call.crossing for call in self.calls)

    def sent(self, layer: int) -> tuple[int, ...]:
        """Rows for each rank in all calls of one expert layer."""
        return tuple(map(sum, zip(*(call.sent for call in self.calls if call.layer == layer), strict=True)))


_COUNTING: list[CopyCount] = []


@contextmanager
def count_copies() -> Iterator[CopyCount]:
    """Count the copies that this process sends to other ranks while the block runs, in any of its threads."""
    count = CopyCount()
    _COUNTING.append(count)
    try:
        yield count
    finally:
        _COUNTING[:] = [other for other in _COUNTING if other is not count]


def tell(dispatched: Dispatched) -> None:
    """Let all who count know of a call."""
    for count in tuple(_COUNTING):
        count.calls.append(dispatched)
