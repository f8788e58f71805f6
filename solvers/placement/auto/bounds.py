"""Lower bounds: no plan with these slots can be faster than this.

Compute: a rank is no faster than the mean over ranks, or than one copy of the hottest expert when copies are spread
best. Traffic: a token reaches no fewer places than its experts need room, and somewhere it arrives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.slots import SlotCounts

Array = NDArray[np.float64]


def layer_bounds(objective: Objective, slots: SlotCounts) -> Array:
    """Seconds below which no plan can be, ``[scenarios, layers]``, for ``slots`` per rank in each layer."""
    found = np.zeros((len(objective.workload.scenarios), objective.model.num_layers))
    for number in range(len(found)):
        for at in range(objective.model.num_layers):
            found[number, at] = _compute(objective, number, at, int(slots[at]))
            found[number, at] += _traffic(objective, number, at, int(slots[at]))
    return found


def bound(objective: Objective, slots: SlotCounts) -> float:
    """The objective below which no plan can be."""
    return float(objective.joined(layer_bounds(objective, slots).sum(1)))


def _compute(objective: Objective, number: int, at: int, size: int) -> float:
    counts = objective.workload.scenarios[number].counts[:, at]
    ranks = objective.cluster.num_ranks
    mean = counts.sum(1) / objective.rates.sum()
    if objective.split == "even":
        hottest = smallest_copy(counts, size * ranks, ranks) / objective.rates.max()
    else:
        hottest = counts.max(1) / ranks / objective.rates.max()
    read = np.minimum(counts, 1.0).sum(1) / objective.reads.sum()
    return float(np.maximum(np.maximum(mean, hottest), read).mean()) + objective.cluster.launch


def smallest_copy(counts: Array, num_slots: int, most: int) -> Array:
    """The least possible largest load of a copy in each batch, ``[batches]``, from counts ``[batches, experts]``.

    With ``num_slots`` copies in all and at most ``most`` of an expert; bisection on the copies that a load needs.
    """
    low, high = counts.max(1) / most, counts.max(1)
    for _ in range(40):
        middle = (low + high) / 2.0
        safe = np.maximum(middle, 1e-30)[:, None]
        needed = np.maximum(np.ceil(counts / safe - 1e-9), 1.0).sum(1)
        fits = needed <= num_slots
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    smallest: Array = low
    return smallest


def _traffic(objective: Objective, number: int, at: int, size: int) -> float:
    """The least a port can carry when the fewest possible copies are spread over all ports evenly."""
    kind, cluster, model = objective.communication[number], objective.cluster, objective.model
    scenario = objective.workload.scenarios[number]
    if kind == "resident":
        return objective.latency / 2 if at else 0.0
    tokens = float(scenario.tokens[:, at].mean())
    both = model.dispatch_bytes + model.combine_bytes
    explicit = scenario.experts is not None and (objective.split == "nearest" or scenario.sources is not None)
    if explicit:  # a token may find all it needs where it is
        return objective.latency
    top_k = model.top_k
    if scenario.experts is not None:
        top_k = int((scenario.experts[:, at] >= 0).sum(1).min())
    per_expert = kind == "per-expert"
    if per_expert:
        reach_nodes = reach_ranks = float(scenario.counts[:, at].sum() / max(scenario.tokens[:, at].sum(), 1e-9))
    elif scenario.experts is None:  # independent choices: at least what one place would see
        reach_nodes = reach_ranks = 0.0
    else:
        reach_nodes = float(np.ceil(top_k / (size * cluster.node_sizes.max())))
        reach_ranks = float(np.ceil(top_k / size))
    nodes = _least_busiest(objective.ports.nodes[:, : cluster.num_nodes].diagonal(), reach_nodes)
    ranks = _least_busiest(objective.ports.ranks, reach_ranks)
    return objective.latency + tokens * both * max(nodes, ranks)


def _least_busiest(cost: Array, reached: float) -> float:
    """Least largest ``cost * part`` when parts sum to ``reached``: all ports equally busy."""
    if not (cost > 0).all():
        return 0.0
    return float(reached / (1.0 / cost).sum())
