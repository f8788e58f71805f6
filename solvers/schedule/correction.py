"""Tables of schedules made to agree with what whole schedules lost.

What removals lose by themselves adds up to less than what they lose together, because outputs move by sums of what each
one moves them by. A few schedules that were run tell in which power losses add up, and what a layer's losses are to be
multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.schedule.tokens import TokenTable

Array = NDArray[np.float64]
_POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_STIFFNESS = 1.0  # what a factor of e costs, beside a schedule that is wrong by as much; few tell layers apart
_STEPS, _LONGEST = 12, 1.5


def corrected(table: TokenTable, measured: Mapping[tuple[int, ...], float]) -> TokenTable:
    """``table`` with the power in which losses add up, and a factor for each layer, that suit the losses ``measured``
    of schedules best: least squares of the logarithms, factors drawn towards 1. Schedules that lose nothing, or that
    the table does not allow, tell nothing."""
    rows, wanted = [], []
    for schedule, loss in measured.items():
        parts = table.parts(schedule)
        if all(map(math.isfinite, parts)) and sum(parts) > 0 and 0 < loss < math.inf:
            rows.append(parts)
            wanted.append(loss)
    if not rows:
        return table
    losses, target = np.array(rows), np.log(wanted)
    fits = {power: _factors(losses**power, power, target) for power in _POWERS}
    power = min(fits, key=lambda power: fits[power][1])
    factors = np.exp(fits[power][0])
    return replace(table, loss=table.loss * factors[:, None, None], power=power)


def _factors(shares: Array, power: float, target: Array) -> tuple[Array, float]:
    """Logarithms of the factors, ``[layers]``, and the error that is left; by Gauss and Newton."""
    found = np.zeros(shares.shape[1])
    for _ in range(_STEPS):
        weighted = shares * np.exp(power * found)
        total = weighted.sum(1)
        wrong = np.log(total) / power - target
        slopes = weighted / total[:, None]
        matrix = slopes.T @ slopes + _STIFFNESS * np.eye(len(found))
        step = np.linalg.solve(matrix, slopes.T @ wrong + _STIFFNESS * found)
        found = found - np.clip(step, -_LONGEST, _LONGEST)
    weighted = shares * np.exp(power * found)
    wrong = np.log(weighted.sum(1)) / power - target
    return found, float((wrong**2).sum() + _STIFFNESS * (found**2).sum())
