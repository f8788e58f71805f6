"""Local search of one layer: the best swap again and again, then small random kicks and the same again."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.auto.items import Ints
from regraft.solvers.placement.auto.state import State

#: Ranks looked at in one step because they hold the layer up, swaps made in one step, and swaps of a kick.
_HOT_RANKS = 2
_SWAPS = 6
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
    """Make the best few swaps while there is one that helps, at most ``steps`` times; returns how often."""
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
    enough = state.score - 1e-9 * abs(state.score)
    helpful = np.flatnonzero(scores < enough)
    for number, swap in enumerate(helpful[np.argsort(scores[helpful], kind="stable")][:_SWAPS]):
        pair = first[swap : swap + 1], second[swap : swap + 1]
        if number == 0 or _still_helps(state, pair, allowed):
            state.swap(int(pair[0][0]), int(pair[1][0]))
    return bool(len(helpful))


def _still_helps(state: State, pair: tuple[Ints, Ints], allowed: Allowed | None) -> bool:
    """Whether a swap that helped before others were made is allowed and helps after them."""
    fine = state.allowed(*pair).all() and (allowed is None or allowed(state, *pair).all())
    return bool(fine) and float(state.scores(*pair)[0]) < state.score - 1e-9 * abs(state.score)


def _candidates(state: State) -> tuple[Ints, Ints]:
    """Pairs of items: all on the hottest ranks with all, and for each the one with which it saves most traffic."""
    number = state.items.number
    hot = np.flatnonzero(np.isin(state.rank, state.hottest(_HOT_RANKS)))
    first = [np.repeat(hot, number)]
    second = [np.tile(np.arange(number), len(hot))]
    saving = _saving(state)
    if saving is not None:
        partner = saving.argmin(1)
        useful = np.flatnonzero(saving[np.arange(number), partner] < 0.0)
        first.append(useful)
        second.append(partner[useful])
    return np.concatenate(first), np.concatenate(second)


def _saving(state: State) -> NDArray[np.float64] | None:
    """Change of mean port seconds by every swap, ``[items, items]``; None where nothing is known of pairs."""
    total = None if state.pulls is None else _pull_saving(state)
    price = state.objective.weights * state.tokens * state.bytes
    ports = state.objective.ports
    for reach, cost in ((state.nodes, ports.nodes.mean()), (state.ranks, ports.ranks.mean() / len(ports.ranks))):
        if reach is None or (reach is state.ranks and state.nodes is not None):
            continue
        change = reach.saving(price * cost)
        if change is not None:
            total = change if total is None else total + change
    return total


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
