"""Items to ranks by load alone: longest processing time first, then swaps with the most loaded rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.auto.items import Array, Ints

_SWAPS = 400


def pack_items(weight: Array, expert: Ints, cell: Ints, cell_of_rank: Ints, speed: Array, size: int) -> Ints:
    """The rank of each item: heaviest first, to the rank of its cell that is done first and has room.

    ``cell`` ``[items]`` restricts an item to the ranks with that ``cell_of_rank``; ranks hold ``size`` items and, where
    possible, no expert twice. (Graham 1969, with the number of jobs per machine bounded.)
    """
    ranks = len(cell_of_rank)
    members = {int(c): np.flatnonzero(cell_of_rank == c).tolist() for c in np.unique(cell_of_rank)}
    total, filled = [0.0] * ranks, [0] * ranks
    held: list[set[int]] = [set() for _ in range(ranks)]
    rank_of = np.empty(len(weight), dtype=np.int64)
    for item in np.argsort(-weight, kind="stable").tolist():
        name, load = int(expert[item]), float(weight[item])
        best, best_time = -1, (2, 0.0)
        for rank in members[int(cell[item])]:
            if filled[rank] < size:
                time = (int(name in held[rank]), (total[rank] + load) / float(speed[rank]))
                if time < best_time:
                    best, best_time = rank, time
        rank_of[item] = best
        total[best] += load
        filled[best] += 1
        held[best].add(name)
    return rank_of


def level(weight: Array, expert: Ints, rank: Ints, cell_of_rank: Ints, speed: Array) -> Ints:
    """Swap items of the most loaded rank with others of its cell while its load falls and none rises above it."""
    rank = rank.copy()
    ranks = len(speed)
    total = np.bincount(rank, weight, minlength=ranks).astype(np.float64)
    held: NDArray[np.bool_] = np.zeros((ranks, int(expert.max()) + 1), dtype=bool)
    held[rank, expert] = True
    stuck = np.zeros(ranks, dtype=bool)
    for _ in range(_SWAPS):
        time = np.where(stuck, -np.inf, total / speed)
        hot = int(time.argmax())
        if stuck[hot]:
            break
        pair = _best_swap(weight, expert, rank, (total, held, cell_of_rank, speed), hot)
        if pair is None:
            stuck |= cell_of_rank == cell_of_rank[hot]
            continue
        first, second = pair
        other = int(rank[second])
        change = weight[second] - weight[first]
        total[hot] += change
        total[other] -= change
        held[hot, expert[first]] = held[other, expert[second]] = False
        held[other, expert[first]] = held[hot, expert[second]] = True
        rank[first], rank[second] = other, hot
    return rank


def _best_swap(
    weight: Array, expert: Ints, rank: Ints, state: tuple[Array, NDArray[np.bool_], Ints, Array], hot: int
) -> tuple[int, int] | None:
    total, held, cell_of_rank, speed = state
    mine = np.flatnonzero(rank == hot)
    others = np.flatnonzero((rank != hot) & (cell_of_rank[rank] == cell_of_rank[hot]))
    if not len(others):
        return None
    there = rank[others]
    change = weight[mine][:, None] - weight[others][None, :]
    fine = ~held[there[None, :], expert[mine][:, None]] & ~held[hot, expert[others]][None, :]
    worst = np.maximum((total[hot] - change) / speed[hot], (total[there][None, :] + change) / speed[there][None, :])
    worst = np.where(fine, worst, np.inf)
    first, second = np.unravel_index(int(worst.argmin()), worst.shape)
    if worst[first, second] >= total[hot] / speed[hot] * (1.0 - 1e-9):
        return None
    return int(mine[first]), int(others[second])
