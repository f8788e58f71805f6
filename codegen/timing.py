"""Timing kernels beside each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

_NOT_IN_VAIN = 1.3  # a kernel that takes this much longer than the best is not measured again
_TRIED = 1e-3  # seconds of measuring before that is known
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30


def best_in_turn(names: Iterable[str], seconds: Callable[[str], float], limit: float) -> dict[str, float]:
    """Least seconds of each, measured in turn until ``limit`` seconds are used up: noise then hits all alike.
    ``seconds`` makes one call of a name and says how long it took."""
    best = dict.fromkeys(names, math.inf)
    deadline = time.perf_counter() + limit
    rounds = 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and time.perf_counter() < deadline):
        least = min(best.values(), default=0.0)
        for name, known in best.items():
            if rounds * least > _TRIED and known > _NOT_IN_VAIN * least:
                continue
            best[name] = min(known, seconds(name))
        rounds += 1
    return best
