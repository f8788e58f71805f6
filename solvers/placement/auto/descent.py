"""Local search of one layer: the best swap again and again, then small random kicks and the same again."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.auto.items import Ints
from regraft.solvers.placement.auto.state import State

#: Swaps looked at in one step because they save copies, and because they cool a hot rank.
_BY_COPIES = 1200
_HOT_RANKS = 2
_KICK = 3

Allowed = Callable[[State, Ints, Ints], NDArray[np.bool_]]


class Clock:
    """A moment after which to stop; None for never."""

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline

    @classmethod
    def after(cls, seconds: float | None) -> Clock:
        """A clock that runs out in so many seconds."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    @property
    def out(self) -> bool:
        """Whether the time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def left(self) -> float:
        """Seconds left, infinite without a limit."""
        return np.inf if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def descend(state: State, steps: int, clock: Clock, allowed: Allowed | None = None) -> int:
    """Make the best swap while there is one that helps, at most ``steps`` times; returns how many were made."""
    for made in range(steps):
        if clock.out or not _step(state, allowed):
            return made
    return steps


def search(state: State, rounds: int, steps: int, seed: int, clock: Clock, allowed: Allowed | None = None) -> State:
    """Descend, then ``rounds`` times kick the best state at random and descend again. The best state found."""
    generator = np.random.default_rng(seed)
    descend(state, steps, clock, allowed)
    best = state
    for _ in range(rounds):
        if clock.out:
            break
        trial = best.copy()
        _kick(trial, generator, allowed)
        descend(trial, max(steps // 4, 8), clock, allowed)
        if trial.score < best.score - 1e-12 * abs(best.score):
            best = trial
    return best


def _step(state: State, allowed: Allowed | None) -> bool:
    first, second = _candidates(state)
    fine = state.allowed(first, second)
    if allowed is not None:
        fine &= allowed(state, first, second)
    first, second = first[fine], second[fine]
    if not len(first):
        return False
    scores = state.scores(first, second)
    best = int(scores.argmin())
    if scores[best] >= state.score - 1e-9 * abs(state.score):
        return False
    state.swap(int(first[best]), int(second[best]))
    return True


def _candidates(state: State) -> tuple[Ints, Ints]:
    """Pairs of items: everything on the hottest ranks with everything, and pairs that save the most copies."""
    number = state.items.number
    hot = np.flatnonzero(np.isin(state.rank, state.hottest(_HOT_RANKS)))
    first = [np.repeat(hot, number)]
    second = [np.tile(np.arange(number), len(hot))]
    weights = state.objective.weights
    for reach in (state.nodes, state.ranks):
        saving = None if reach is None else reach.saving(weights)
        if saving is not None:
            _add_pairs(saving, first, second)
    if state.pulls is not None:
        _add_pairs(_pull_saving(state), first, second)
    return np.concatenate(first), np.concatenate(second)


def _add_pairs(saving: NDArray[np.float64], first: list[Ints], second: list[Ints]) -> None:
    """The pairs (each once) with the lowest change."""
    number = len(saving)
    flat = np.where(np.tri(number, k=0, dtype=bool), np.inf, saving).reshape(-1)
    count = min(_BY_COPIES, flat.size - 1)
    lowest = np.argpartition(flat, count)[:count]
    lowest = lowest[flat[lowest] < 0.0]
    first.append(lowest // number)
    second.append(lowest % number)


def _pull_saving(state: State) -> NDArray[np.float64]:
    assert state.pulls is not None
    pull = np.tensordot(state.objective.weights, state.pulls, 1)
    own = pull[np.arange(len(pull)), state.rank]
    cross = pull[:, state.rank]
    saving: NDArray[np.float64] = cross + cross.T - own[:, None] - own[None, :]
    return saving


def _kick(state: State, generator: np.random.Generator, allowed: Allowed | None) -> None:
    number = state.items.number
    for _ in range(_KICK):
        first, second = generator.integers(0, number, (2, 16))
        fine = state.allowed(first, second)
        if allowed is not None:
            fine &= allowed(state, first, second)
        if fine.any():
            chosen = int(fine.argmax())
            state.swap(int(first[chosen]), int(second[chosen]))
