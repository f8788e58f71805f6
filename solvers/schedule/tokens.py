"""Token schedules: how many tokens go behind each layer, by dynamic programming over layer and tokens left.

Time is not additive in the numbers removed, because every later layer sees fewer tokens; it is in the tokens that each
layer sees. A state is therefore (layer, tokens left), and its labels are pairs of loss and time of which none beats
another. The front of the labels behind the last layer holds the fastest schedule for every limit at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.schedule.errors import ScheduleError
from regraft.solvers.schedule.points import fastest, front

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TokenTable:
    """What schedules are made from.

    ``removals`` are the numbers of tokens that may go behind a layer, 0 among them. ``seconds[layer, left]`` is the
    time from behind the reduction of ``layer`` to the next one when ``left`` tokens are left, ``overhead[layer]`` what
    a reduction there costs by itself, ``base`` the time of everything else. ``loss[layer, before, choice]`` is what
    removing ``removals[choice]`` of ``before`` tokens loses, infinite where that is not allowed. ``power``: losses add
    up in this power of theirs, 1 as they are, 1/2 as amplitudes that all point the same way.
    """

    removals: tuple[int, ...]
    seconds: Array
    overhead: Array
    loss: Array
    base: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        layers, sizes = self.seconds.shape if self.seconds.ndim == 2 else (0, 0)
        if layers == 0 or sizes < 2:
            raise ScheduleError(f"seconds has shape {self.seconds.shape}; expected [layers, tokens + 1], both positive")
        if 0 not in self.removals or min(self.removals) < 0:
            raise ScheduleError(
                f"the removals {self.removals} lack 0 or hold a negative number; give 0 and larger ones"
            )
        if self.overhead.shape != (layers,):
            raise ScheduleError(f"overhead has shape {self.overhead.shape}; expected one number for each of {layers}")
        if self.loss.shape != (layers, sizes, len(self.removals)):
            raise ScheduleError(
                f"loss has shape {self.loss.shape}; expected [layers, tokens + 1, removals] = "
                f"{(layers, sizes, len(self.removals))}"
            )
        if np.isnan(self.loss).any() or (self.loss < 0).any() or not np.isfinite(self.seconds).all():
            raise ScheduleError("a loss is negative or not a number, or a time is not finite; measure it again")
        if not 0 < self.power <= 1:
            raise ScheduleError(f"losses were to add up in their power {self.power}; give a number above 0 and up to 1")

    @property
    def layers(self) -> int:
        """Number of layers behind which tokens may go."""
        return int(self.seconds.shape[0])

    @property
    def tokens(self) -> int:
        """Number of tokens before any is removed."""
        return int(self.seconds.shape[1]) - 1

    def cost(self, schedule: tuple[int, ...]) -> tuple[float, float]:
        """Loss and time of a schedule; the loss is infinite where it is not allowed."""
        parts, seconds, left = self.parts(schedule), self.base, self.tokens
        if not all(map(math.isfinite, parts)):
            return math.inf, math.inf
        for layer, removed in enumerate(schedule):
            left -= removed
            seconds += float(self.seconds[layer, left] + (self.overhead[layer] if removed else 0.0))
        return self.added(sum(self.share(part) for part in parts)), seconds

    def parts(self, schedule: tuple[int, ...]) -> list[float]:
        """The loss of each step of a schedule, infinite where it is not allowed."""
        parts, left = [], self.tokens
        for layer, removed in enumerate(schedule):
            allowed = removed <= left and removed in self.removals
            parts.append(float(self.loss[layer, left, self.removals.index(removed)]) if allowed else math.inf)
            left -= removed if allowed else 0
        return parts

    def share(self, loss: float) -> float:
        """A loss in the power in which losses add up."""
        return float(loss**self.power)

    def added(self, shares: float) -> float:
        """The loss of a sum of shares."""
        return float(shares ** (1 / self.power))


@dataclass(frozen=True)
class TokenSchedule:
    """How many tokens go behind each layer, with the loss and time that the tables predict."""

    removed: tuple[int, ...]
    loss: float
    seconds: float


@dataclass(frozen=True)
class TokenFront:
    """Every schedule that is best for some limit, by rising loss; ``bound`` is a time that no schedule within the
    limit goes below, ``gap`` how far the fastest is above it (0 to 1). ``stop`` is "optimal", or "labels" where more
    were met than are kept."""

    schedules: tuple[TokenSchedule, ...]
    bound: float
    gap: float
    stop: str


@dataclass(frozen=True)
class _Label:
    loss: float
    seconds: float
    removed: tuple[int, ...]


def solve_tokens(table: TokenTable, limit: float = math.inf, most_labels: int = 256) -> TokenFront:
    """The front of schedules whose loss is at most ``limit``; the schedule that removes nothing is always among those
    of loss 0.

    Exact while no state has more than ``most_labels`` labels; beyond, those nearest to each other in loss are joined,
    the faster one kept. Raises ``ScheduleError`` for a negative limit.
    """
    if not limit >= 0:
        raise ScheduleError(f"the limit {limit} was given; give 0 or more")
    states, cut = {table.tokens: [_Label(0.0, table.base, ())]}, False
    most_shares = table.share(limit)
    for layer in range(table.layers):
        reached: dict[int, list[_Label]] = {}
        for left, labels in states.items():
            for removed, more_loss, more_seconds in _steps(table, layer, left):
                reached.setdefault(left - removed, []).extend(
                    _Label(label.loss + more_loss, label.seconds + more_seconds, (*label.removed, removed))
                    for label in labels
                    if label.loss + more_loss <= most_shares
                )
        states = {}
        for left, labels in reached.items():
            kept = front(labels)
            cut = cut or len(kept) > most_labels
            states[left] = _thinned(kept, most_labels)
    last = front(label for labels in states.values() for label in labels)
    found = tuple(TokenSchedule(label.removed, table.added(label.loss), label.seconds) for label in last)
    best = fastest(found, limit)
    assert best is not None  # removing nothing loses nothing
    bound = _bound(table, limit) if cut else best.seconds
    gap = (best.seconds - bound) / best.seconds if best.seconds > 0 else 0.0
    return TokenFront(found, bound, max(gap, 0.0), "labels" if cut else "optimal")


def _steps(table: TokenTable, layer: int, left: int) -> Iterator[tuple[int, float, float]]:
    """What may be removed behind ``layer`` of ``left`` tokens, with its share of the loss and the time up to the next
    layer."""
    for choice, removed in enumerate(table.removals):
        if removed <= left and math.isfinite(loss := float(table.loss[layer, left, choice])):
            overhead = float(table.overhead[layer]) if removed else 0.0
            yield removed, table.share(loss), overhead + float(table.seconds[layer, left - removed])


def _thinned(labels: list[_Label], most: int) -> list[_Label]:
    """At most ``most`` labels of a front: in each of as many spans of loss the fastest, and the first."""
    if len(labels) <= most:
        return labels
    edges = np.linspace(labels[0].loss, labels[-1].loss, most)
    span = np.searchsorted(edges, [label.loss for label in labels])
    return [label for place, label in enumerate(labels) if place + 1 == len(labels) or span[place] != span[place + 1]]


def _bound(table: TokenTable, limit: float, parts: int = 512) -> float:
    """The least time when losses are rounded down to parts of the limit: no schedule within it is faster."""
    limit = table.share(limit)
    if not math.isfinite(limit) or limit == 0:
        parts, limit = 0, 1.0  # nothing binds; or only what loses nothing is allowed
    start = np.full(parts + 1, np.inf)
    start[0] = table.base
    states = {table.tokens: start}
    for layer in range(table.layers):
        reached: dict[int, Array] = {}
        for left, least in states.items():
            for removed, loss, seconds in _steps(table, layer, left):
                spent = int(loss / limit * parts)
                if spent > parts:
                    continue
                value = np.full(parts + 1, np.inf)
                value[spent:] = least[: parts + 1 - spent] + seconds
                known = reached.get(left - removed)
                reached[left - removed] = value if known is None else np.minimum(known, value)
        states = reached
    return float(min(value.min() for value in states.values()))
