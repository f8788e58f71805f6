"""Layers that do not depend on each other, scenarios averaged: the best table of each layer makes the best plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regraft.solvers.placement.auto.items import Array
from regraft.solvers.placement.auto.layer import LayerTask, layer_objective, solve_layer
from regraft.solvers.placement.auto.search import Search
from regraft.solvers.placement.plan import Plan, Slots

#: Part of the objective that being as balanced as EPLB may cost.
BALANCE_WORTH = 0.01


@dataclass(frozen=True)
class Others:
    """What the other layers come to, ``[scenarios]``: seconds, and unevenness where it counts."""

    seconds: Array
    uneven: Array | None = None


def improve_layers(search: Search) -> Plan:
    """The best plan found, not worse than any of the starts."""
    layers = search.best.num_layers
    none = Others(np.zeros(len(search.objective.workload.scenarios)))
    tables = [_choose(search, at, [search.best.slots[at]]) for at in range(layers)]
    for at, table in solved(search, [none] * layers, search.best.slots):
        tables[at] = _choose(search, at, [search.best.slots[at], table])
        search.report((at + 1) / layers)
    return replace(search.best, slots=tuple(tables))


def solved(search: Search, others: list[Others], firsts: Sequence[Slots]) -> Iterator[tuple[int, Slots]]:
    """Every layer's best table in layer order, ``firsts`` among the starts; time left is shared out among the layers
    that are left.
    """
    layers = len(others)
    if search.executor is not None:
        tasks = [_task(search, at, others[at], firsts[at], search.share(layers)) for at in range(layers)]
        yield from enumerate(search.run(solve_layer, tasks))
        return
    for at in range(layers):
        if search.clock.out:
            return
        yield at, solve_layer(_task(search, at, others[at], firsts[at], search.share(layers - at)))


def _task(search: Search, at: int, others: Others, first: Slots, seconds: float | None) -> LayerTask:
    given = [first, *(plan.slots[at] for plan in search.starts.values())]
    return LayerTask(
        layer_objective(search.smooth, at),
        0,
        int(search.slots[at]),
        tuple(given),
        search.constraints.groups,
        search.pins(at),
        others.seconds,
        search.options.effort,
        search.options.seed + at,
        seconds,
        even_as=None if search.keep is None else search.keep.slots[at],
        uneven=others.uneven,
        part=1.0 / search.objective.model.num_layers,
    )


def _choose(search: Search, at: int, tables: list[Slots]) -> Slots:
    """The cheapest table that is as balanced as the one to keep up with; the cheapest of all where balance would cost
    too much, or more than a start costs.
    """
    tables = [*tables, *(plan.slots[at] for plan in search.starts.values())]
    costs = [float(search.objective.joined(search.seconds(at, table))) for table in tables]
    if search.keep is None:
        return tables[int(np.argmin(costs))]
    least = search.balance(at, search.keep.slots[at]) * (1.0 - 1e-9)
    even = [search.balance(at, table) >= least for table in tables]
    among = [cost if fine else np.inf for cost, fine in zip(costs, even, strict=True)]
    others = [float(search.objective.joined(search.seconds(at, p.slots[at]))) for p in search.baselines.values()]
    limit = min(*costs[-len(search.starts) :], *others)
    if min(among) <= min(limit, min(costs) * (1.0 + BALANCE_WORTH)) * (1.0 + 1e-12):
        return tables[int(np.argmin(among))]
    return tables[int(np.argmin(costs))]
