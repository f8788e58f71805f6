"""Timing kernels beside each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

_NOT_IN_VAIN = 1.3  # a kernel that takes this much longer than the best is not measured again
_TRIED = 1e-3  # seconds of measuring before that is known
_ALIKE = 1.2  # of a kernel's two least times: else both may be those of first calls, or of a busy machine
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30
_SETTLED_ROUNDS, _SETTLED = 3, 0.99  # rounds in which no time fell below this share of what was known


def best_in_turn(names: Iterable[str], seconds: Callable[[str], float], limit: float) -> dict[str, float]:
    """Least seconds of each, measured in turn: noise then hits all alike. ``seconds`` makes one call of a name and says
    how long it took. Ends when one is left that may be the fastest, when several rounds brought nothing new, or when
    ``limit`` seconds are used up; the first two only where each kernel's two least times are alike."""
    times = {name: (math.inf, math.inf) for name in names}  # the two least
    deadline = time.perf_counter() + limit
    rounds, news = 0, 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and time.perf_counter() < deadline):
        left = _may_be_fastest(times, rounds)
        settled = rounds - news >= _SETTLED_ROUNDS and all(_believed(times[name]) for name in left)
        if settled or (rounds and len(left) < min(len(times), 2)):
            break
        rounds += 1
        for name in left:
            taken, (best, second) = seconds(name), times[name]
            times[name] = min(best, taken), min(second, max(best, taken))
            news = rounds if taken < _SETTLED * best else news
    return {name: best for name, (best, _) in times.items()}


def _may_be_fastest(times: Mapping[str, tuple[float, float]], rounds: int) -> list[str]:
    """The names that are worth another call after ``rounds`` of them."""
    least = min((best for best, _ in times.values()), default=0.0)
    if not rounds or rounds * least <= _TRIED:
        return list(times)
    return [name for name, known in times.items() if known[0] <= _NOT_IN_VAIN * least or not _believed(known)]


def _believed(known: tuple[float, float]) -> bool:
    best, second = known
    return second <= _ALIKE * best
