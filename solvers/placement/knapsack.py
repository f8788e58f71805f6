"""One option for each of several layers under a common budget: the multiple-choice knapsack, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def choose(costs: Sequence[NDArray[np.int64]], values: Sequence[NDArray[np.float64]], budget: int) -> list[int]:
    """The option of each layer with the least sum of ``values``, sum of ``costs`` at most ``budget``.

    Every layer needs an option of cost 0. Dynamic programming over layers and budget, O(layers * budget * options).
    """
    best = np.zeros(budget + 1)
    picks = []
    for cost, value in zip(costs, values, strict=True):
        table = np.full((len(cost), budget + 1), np.inf)
        for option, (spent, worth) in enumerate(zip(cost, value, strict=True)):
            if spent <= budget:
                table[option, spent:] = best[: budget + 1 - spent] + worth
        picks.append(table.argmin(0))
        best = table.min(0)
    left, chosen = budget, []
    for cost, pick in zip(reversed(costs), reversed(picks), strict=True):
        option = int(pick[left])
        chosen.append(option)
        left -= int(cost[option])
    return chosen[::-1]
