"""How many copies each expert gets, and how many slots each layer gets under a memory budget."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.constraints import Constraints, check_memory
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.knapsack import choose
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.slots import SlotCounts

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def replica_counts(load: Array, num_slots: int, most: int) -> Ints:
    """Copies of each expert, at most ``most``, that minimise the largest load of a copy.

    ``load`` is ``[experts]``. One copy more for the expert with the largest load per copy, until the slots are used:
    optimal for that aim. Raises ``PlacementError`` where there are fewer slots than experts or more than fit.
    """
    experts = len(load)
    if not experts <= num_slots <= experts * most:
        raise PlacementError(f"{num_slots} slots were given for {experts} experts with at most {most} copies each")
    count = np.ones(experts, dtype=np.int64)
    heap = [(-float(load[expert]), expert) for expert in range(experts)]
    heapq.heapify(heap)
    for _ in range(num_slots - experts):
        while True:
            _, expert = heapq.heappop(heap)
            if count[expert] < most:
                break
        count[expert] += 1
        heapq.heappush(heap, (-float(load[expert]) / float(count[expert]), expert))
    return count


def scenario_load(objective: Objective, at: int) -> Array:
    """``[experts]``: what replicas are given by. Weighted mean of scenarios' shares, or under "min-max" the largest."""
    shares = np.stack([s.counts[:, at].mean(0) for s in objective.workload.scenarios])
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-12)
    if objective.aggregate == "min-max":
        largest: Array = shares.max(0)
        return largest
    mean: Array = objective.weights @ shares
    return mean


def budgeted_slots(
    objective: Objective, constraints: Constraints, most_extra: int = 4, budget: float | None = None
) -> SlotCounts:
    """Slots per rank in each layer, spent where they balance most, within the constraints' memory.

    Each layer gets what its experts need and up to ``most_extra`` slots per rank more, in all at most ``budget`` bytes
    of them per rank; the gain of a slot is the drop of the smallest possible largest rank load. Raises
    ``PlacementError`` where not even one copy of each expert fits.
    """
    model, cluster = objective.model, objective.cluster
    least = -(-model.num_experts // cluster.num_ranks)
    base = np.full(model.num_layers, least, dtype=np.int64)
    check_memory(base, model, cluster, constraints)
    bytes_left = float(constraints.budget(cluster).min()) - float(base.sum()) * model.expert_bytes
    room = int((bytes_left if budget is None else min(bytes_left, budget)) // model.expert_bytes)
    most_extra = min(most_extra, model.num_experts - least)
    options = np.arange(most_extra + 1)
    values = [_largest_loads(objective, at, least, most_extra) for at in range(model.num_layers)]
    chosen = choose([options] * model.num_layers, values, min(room, most_extra * model.num_layers))
    return base + np.array(chosen, dtype=np.int64)


def _largest_loads(objective: Objective, at: int, least: int, most_extra: int) -> Array:
    """Largest rank load with 0, 1, … extra slots per rank: no less than the mean or the largest copy, tokens."""
    ranks = objective.cluster.num_ranks
    tokens = [scenario.counts[:, at].sum(1).mean() for scenario in objective.workload.scenarios]
    load = scenario_load(objective, at) * float(np.mean(tokens))
    values = []
    for extra in range(most_extra + 1):
        count = replica_counts(load, (least + extra) * ranks, ranks)
        values.append(max(float((load / count).max()), float(load.sum()) / ranks))
    return np.array(values)
