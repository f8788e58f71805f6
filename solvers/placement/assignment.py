"""The linear assignment problem: one column for each row at least total cost, by shortest augmenting paths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row for a square ``cost``; the sum is the least possible.

    Successive shortest paths with potentials (Jonker and Volgenant 1987), O(n^3) with vectorised rows.
    """
    size = len(cost)
    row_of = np.full(size + 1, -1, dtype=np.int64)
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    for row in range(size):
        row_of[size] = row
        column = size
        distance = np.full(size, np.inf)
        came_from = np.full(size, -1, dtype=np.int64)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            current = row_of[column]
            reduced = cost[current] - row_price[current] - column_price[:size]
            shorter = ~done[:size] & (reduced < distance)
            distance[shorter], came_from[shorter] = reduced[shorter], column
            following = int(np.where(done[:size], np.inf, distance).argmin())
            step = distance[following]
            row_price[row_of[done]] += step
            column_price[done] -= step
            distance[~done[:size]] -= step
            column = following
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    found = np.empty(size, dtype=np.int64)
    found[row_of[:size]] = np.arange(size)
    return found
