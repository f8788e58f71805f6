"""One layer as the local search sees it: copies of experts (items) that lie on ranks, and what each brings along.

Under an even split every copy has tokens of its own, whichever rank it lies on. So a layer with copies is a layer
without them, of more items, of which two of one expert may not share a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Slots
from regraft.solvers.placement.split import token_copy

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Items:
    """Copies of one layer's experts.

    ``expert`` ``[items]``; ``load`` and ``reads`` ``[rows, items]``, tokens and activated experts in each batch of each
    scenario, ``scenario`` ``[rows]`` the row's scenario, ``mean`` ``[scenarios, rows]`` the mean over its rows;
    ``tokens`` per scenario ``[tokens, top_k]``, the items of sampled tokens (-1: none), None where not recorded.
    """

    expert: Ints
    count: Ints
    load: Array
    reads: Array
    scenario: Ints
    mean: Array
    tokens: tuple[Ints | None, ...]

    @property
    def number(self) -> int:
        """How many items there are."""
        return len(self.expert)

    @property
    def weight(self) -> Array:
        """``[items]``: mean load, each scenario scaled to the same total."""
        mean = self.mean @ self.load
        weight: Array = (mean / np.maximum(mean.sum(1, keepdims=True), 1e-12)).mean(0)
        return weight


def items_of(objective: Objective, at: int, count: Ints) -> Items:
    """The items of layer ``at`` (by position) with ``count`` copies of each expert, ``[experts]``."""
    expert = np.repeat(np.arange(len(count)), count)
    first = np.cumsum(count) - count
    loads, tokens, numbers = [], [], []
    for number, scenario in enumerate(objective.workload.scenarios):
        loads.append(scenario.counts[:, at][:, expert] / count[expert])
        numbers.append(np.full(len(scenario.counts), number))
        tokens.append(None if scenario.experts is None else _token_items(scenario.experts[:, at], count, first))
    load, row = np.concatenate(loads), np.concatenate(numbers)
    mean = np.stack([(row == number) / max((row == number).sum(), 1) for number in range(len(tokens))])
    return Items(expert, count, load, np.minimum(load, 1.0), row, mean, tuple(tokens))


def ranks_of(table: Slots, items: Items) -> Ints:
    """The rank of each item under a table ``[ranks, slots]`` with as many copies of each expert."""
    flat = table.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return np.asarray(order // table.shape[1], dtype=np.int64)


def table_of(rank: Ints, items: Items, num_ranks: int) -> Slots:
    """The table of items on ranks, experts ascending on each rank."""
    order = np.lexsort((items.expert, rank))
    return items.expert[order].reshape(num_ranks, -1)


def _token_items(chosen: NDArray[np.int32], count: Ints, first: Ints) -> Ints:
    expert = np.maximum(chosen, 0)
    copy = token_copy(np.arange(len(chosen))[:, None], expert, count[expert])
    return np.where(chosen >= 0, first[expert] + copy, -1)
