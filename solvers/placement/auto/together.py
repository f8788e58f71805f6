"""Layers under "min-max": the worst scenario's time is a sum over layers, so that scenarios tie the layers together.

All layers are annealed at once where traffic follows from sums over experts. Then each layer is searched with what the
others cost, and tables are taken over one by one while the joined cost falls.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from regraft.solvers.placement.auto.annealing import AnnealTask, anneal, can_anneal
from regraft.solvers.placement.auto.independent import Others, solved
from regraft.solvers.placement.auto.items import Array
from regraft.solvers.placement.auto.layer import LayerTask
from regraft.solvers.placement.auto.search import Search
from regraft.solvers.placement.auto.state import WORST_BALANCE
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan

#: Most times that every layer is looked at again with what the others then cost.
_SWEEPS = 4
#: Chains of random swaps that are run, whether or not at a time, and the part of the time left that they get.
_CHAINS = 2
_ANNEALING_PART = 0.7
_MOST_STEPS = 1_000_000


def improve_together(search: Search) -> Plan:
    """Slowdown and unevenness of the worst scenarios fall together; the objective is not worse than any start's."""
    objective = search.objective
    best = min(_annealed(search), key=lambda plan: _plan_cost(search, plan))
    tables, layers = list(best.slots), best.num_layers
    seconds, uneven = _parts(search, best)
    for sweep in range(_SWEEPS):
        if search.clock.out:
            break
        before = _cost(objective, seconds, uneven)
        others = [
            Others(seconds.sum(1) - seconds[:, at], (uneven.sum(1) - uneven[:, at]) / layers) for at in range(layers)
        ]
        alone = search if sweep == 0 else replace(search, executor=None)
        for at, table in solved(alone, others, tables):
            trial = seconds.copy(), uneven.copy()
            trial[0][:, at], trial[1][:, at] = search.seconds(at, table), search.uneven(at, table)
            cheaper = _cost(objective, *trial) < _cost(objective, seconds, uneven)
            most = max(search.limit, float(objective.joined(seconds.sum(1))))
            if cheaper and float(objective.joined(trial[0].sum(1))) <= most:
                tables[at], (seconds, uneven) = table, trial
            search.report((sweep * layers + at + 1) / (_SWEEPS * layers))
        if _cost(objective, seconds, uneven) > before * (1.0 - 1e-4):
            break
    return replace(best, slots=tuple(tables))


def _annealed(search: Search) -> list[Plan]:
    """The best start, and what annealing makes of it, where that is not above the limit."""
    best = search.best
    if not can_anneal(search.smooth) or search.clock.out:
        return [best]
    seconds, effort = search.share(_CHAINS), search.options.effort
    layers = _layer_tasks(search)
    steps = min(_MOST_STEPS, effort.swaps * sum(table.size for table in best.slots))
    tasks = [
        AnnealTask(layers, steps, search.options.seed + chain, None if seconds is None else seconds * _ANNEALING_PART)
        for chain in range(_CHAINS)
    ]
    found = [replace(best, slots=tables) for tables in search.run(anneal, tasks)]
    return [best, *(plan for plan in found if search.objective.value(plan) <= search.limit)]


def _layer_tasks(search: Search) -> tuple[LayerTask, ...]:
    """Every layer of the best start, on fewer batches."""
    effort = search.options.effort
    objective = search.smooth.on(search.smooth.workload.thinned(effort.batches, 0))
    none = np.zeros(len(objective.workload.scenarios))
    return tuple(
        LayerTask(
            objective, at, int(size), (table,), search.constraints.groups, search.pins(at), none, effort,
            search.options.seed, None,
        )
        for at, (size, table) in enumerate(zip(search.slots, search.best.slots, strict=True))
    )  # fmt: skip


def _parts(search: Search, plan: Plan) -> tuple[Array, Array]:
    """Seconds and unevenness, ``[scenarios, layers]`` each."""
    seconds = np.stack([search.seconds(at, table) for at, table in enumerate(plan.slots)], axis=1)
    uneven = np.stack([search.uneven(at, table) for at, table in enumerate(plan.slots)], axis=1)
    return seconds, uneven


def _plan_cost(search: Search, plan: Plan) -> float:
    return _cost(search.objective, *_parts(search, plan))


def _cost(objective: Objective, seconds: Array, uneven: Array) -> float:
    return float(objective.joined(seconds.sum(1))) + WORST_BALANCE * float(uneven.mean(1).max())
