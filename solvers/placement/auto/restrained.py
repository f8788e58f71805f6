"""Improving the plan in service while at most so many experts move: the best swaps of all layers under one bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from regraft.solvers.placement.auto.descent import descend
from regraft.solvers.placement.auto.items import Array, items_of, ranks_of, table_of
from regraft.solvers.placement.auto.layer import LayerTask, frame_of
from regraft.solvers.placement.auto.search import Search
from regraft.solvers.placement.auto.state import State
from regraft.solvers.placement.knapsack import choose
from regraft.solvers.placement.migration import keep_slots
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan, Slots

_STEPS = 64


def improve_within_moves(search: Search) -> Plan:
    """The current plan with swaps that pay most for the experts they move; experts that stay keep their slots.

    Each layer's swaps are found in turn, best first; how many of each layer are made is then a knapsack.
    """
    objective, current, most = search.objective, search.best, search.constraints.max_moves
    assert most is not None
    paths = [_path(search, at, most) for at in range(current.num_layers)]
    costs = [np.array([moved for moved, _, _ in path], dtype=np.int64) for path in paths]
    values = [np.array([value for _, value, _ in path]) for path in paths]
    picks = choose(costs, values, most)
    tables = tuple(path[pick][2] for path, pick in zip(paths, picks, strict=True))
    plan = keep_slots(current, replace(current, slots=tables))
    return plan if objective.value(plan) < objective.value(current) else current


def _path(search: Search, at: int, most: int) -> list[tuple[int, float, Slots]]:
    """(experts moved, objective of the plan with this layer alone changed, table) after each step of a descent."""
    objective, current = search.objective, search.best
    table = current.slots[at]
    means = objective.layer_means(current) if objective.aggregate == "min-max" else None
    base = float(objective.joined(_with(objective, current, at, table, means)))
    path = [(0, base, table)]
    task = _task(search, at)
    items = items_of(objective, at, current.replicas[at])
    state = State(objective, at, items, ranks_of(table, items), frame_of(task, items, ranks_of(table, items)))
    held = current.presence(at)
    for _ in range(_STEPS):
        if not descend(state, 1, search.clock):
            break
        changed = table_of(state.rank, items, current.num_ranks)
        now = replace(current, slots=(*current.slots[:at], changed, *current.slots[at + 1 :])).presence(at)
        moved = int((now & ~held).sum())
        if moved > most:
            break
        path.append((moved, float(objective.joined(_with(objective, current, at, changed, means))), changed))
    return path


def _with(objective: Objective, current: Plan, at: int, table: Slots, means: Array | None) -> Array:
    """Seconds of the layers that this layer's table changes, ``[scenarios]``; with the others' where ``means``."""
    numbers = range(len(objective.workload.scenarios))
    before = current.slots[at - 1] if at else None
    own = np.array([np.sum(objective.layer(number, at, table, before), axis=0).mean() for number in numbers])
    if objective.chained and at + 1 < current.num_layers:
        after = current.slots[at + 1]
        own += [np.sum(objective.layer(number, at + 1, after, table), axis=0).mean() for number in numbers]
    if means is None:
        return own
    others = np.ones(means.shape[1], dtype=bool)
    others[at : at + 2 if objective.chained else at + 1] = False
    whole: Array = own + means[:, others].sum(1)
    return whole


def _task(search: Search, at: int) -> LayerTask:
    objective, current = search.objective, search.best
    table = current.slots[at]
    offset = np.zeros(len(objective.workload.scenarios))
    if objective.aggregate == "min-max":
        means = objective.layer_means(current)
        offset = means.sum(1) - means[:, at]
    return LayerTask(
        objective, at, int(table.shape[1]), (table,), search.constraints.groups, search.pins(at), offset,
        search.options.effort, search.options.seed, None,
    )  # fmt: skip
