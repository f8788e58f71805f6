"""Layers that do not depend on each other: solved one by one or in parallel, and joined by the objective.

Under "weighted" the best table of each layer makes the best plan. Under "min-max" scenarios tie the layers together:
what the others cost is told to each, and tables are taken over one by one while the joined objective falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from regraft.solvers.placement.auto.denoise import denoised
from regraft.solvers.placement.auto.descent import Clock
from regraft.solvers.placement.auto.items import Array
from regraft.solvers.placement.auto.layer import LayerTask, layer_objective, solve_layer
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.state import WORST_BALANCE
from regraft.solvers.placement.constraints import Constraints
from regraft.solvers.placement.metrics import balancedness
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.slots import SlotCounts

#: Most times that every layer is looked at again with what the others then cost.
_SWEEPS = 4
#: Part of the objective that being as balanced as EPLB may cost.
BALANCE_WORTH = 0.01


def improve_layers(
    objective: Objective,
    slots: SlotCounts,
    constraints: Constraints,
    options: Options,
    plans: tuple[Plan, Plan | None, dict[str, Plan]],
    clock: Clock,
    executor: Executor | None,
) -> Plan:
    """The best plan found, not worse than any of ``plans``: the best start, the one whose balance is kept, all."""
    best, keep, starts = plans
    maker = _Maker(objective, slots, constraints, options, keep, starts)
    if objective.aggregate == "weighted":
        return _each_alone(maker, best, clock, executor)
    return _together(maker, best, clock, executor)


class _Maker:
    """Makes tasks of layers and judges their tables on the whole trace."""

    def __init__(
        self,
        objective: Objective,
        slots: SlotCounts,
        constraints: Constraints,
        options: Options,
        keep: Plan | None,
        starts: dict[str, Plan],
    ) -> None:
        self.objective, self.slots, self.constraints, self.options = objective, slots, constraints, options
        self.keep, self.starts = keep, starts
        self.smooth = objective.on(denoised(objective.workload))

    def task(
        self, at: int, offset: Array, uneven: Array | None, seconds: float | None, first: Slots | None = None
    ) -> LayerTask:
        """The task of one layer; ``first`` is one more start."""
        given = [plan.slots[at] for plan in self.starts.values()]
        if first is not None:
            given.insert(0, first)
        return LayerTask(
            layer_objective(self.smooth, at),
            0,
            int(self.slots[at]),
            tuple(given),
            self.constraints.groups,
            self.constraints.pins(self.objective.model.layer_ids[at]),
            offset,
            self.options.effort,
            self.options.seed + at,
            seconds,
            even_as=None if self.keep is None else self.keep.slots[at],
            uneven=uneven,
            part=1.0 / self.objective.model.num_layers,
        )

    def seconds(self, at: int, table: Slots) -> Array:
        """Mean seconds of the layer, ``[scenarios]``."""
        numbers = range(len(self.objective.workload.scenarios))
        return np.array([np.sum(self.objective.layer(number, at, table), axis=0).mean() for number in numbers])

    def uneven(self, at: int, table: Slots) -> Array:
        """Largest over mean rank load, less one, mean over batches, ``[scenarios]``."""
        numbers = range(len(self.objective.workload.scenarios))
        loads = [self.objective.loads(number, at, table).tokens for number in numbers]
        return np.array([float((1.0 / balancedness(load)).mean()) - 1.0 for load in loads])

    def balance(self, at: int, table: Slots) -> float:
        """Balancedness of the layer without sampling noise, weighted mean over scenarios."""
        numbers = range(len(self.objective.workload.scenarios))
        own = [balancedness(self.smooth.loads(number, at, table).tokens).mean() for number in numbers]
        return float(self.objective.weights @ own)

    def report(self, done: int, total: int) -> None:
        """Tell who waits how far it is."""
        if self.options.progress is not None:
            self.options.progress(done / total)


@dataclass(frozen=True)
class _Others:
    """What the other layers come to, ``[scenarios]``: seconds, and unevenness where it counts."""

    seconds: Array
    uneven: Array | None = None


def solved(
    maker: _Maker, others: list[_Others], firsts: list[Slots], clock: Clock, executor: Executor | None
) -> Iterator[tuple[int, Slots]]:
    """Every layer's best table in layer order; time left is shared out among the layers that are left."""
    layers = len(others)
    if executor is None:
        for at in range(layers):
            if clock.out:
                return
            share = None if clock.deadline is None else clock.left / (layers - at)
            yield at, solve_layer(maker.task(at, others[at].seconds, others[at].uneven, share, firsts[at]))
        return
    workers = max(1, int(getattr(executor, "_max_workers", 1)))
    share = None if clock.deadline is None else clock.left * workers / layers
    tasks = [maker.task(at, others[at].seconds, others[at].uneven, share, firsts[at]) for at in range(layers)]
    yield from enumerate(executor.map(solve_layer, tasks))


def _each_alone(maker: _Maker, best: Plan, clock: Clock, executor: Executor | None) -> Plan:
    layers = best.num_layers
    none = _Others(np.zeros(len(maker.objective.workload.scenarios)))
    tables = [_choose(maker, at, [best.slots[at]]) for at in range(layers)]
    for at, table in solved(maker, [none] * layers, list(best.slots), clock, executor):
        tables[at] = _choose(maker, at, [best.slots[at], table])
        maker.report(at + 1, layers)
    return replace(best, slots=tuple(tables))


def _choose(maker: _Maker, at: int, tables: list[Slots]) -> Slots:
    """The cheapest table that is as balanced as the one to keep up with; the cheapest of all where balance would cost
    too much, or more than a start costs.
    """
    tables = [*tables, *(plan.slots[at] for plan in maker.starts.values())]
    costs = [float(maker.objective.joined(maker.seconds(at, table))) for table in tables]
    if maker.keep is None:
        return tables[int(np.argmin(costs))]
    least = maker.balance(at, maker.keep.slots[at]) * (1.0 - 1e-9)
    even = [maker.balance(at, table) >= least for table in tables]
    among = [cost if fine else np.inf for cost, fine in zip(costs, even, strict=True)]
    start_costs = costs[-len(maker.starts) :]
    if min(among) <= min(min(start_costs), min(costs) * (1.0 + BALANCE_WORTH)) * (1.0 + 1e-12):
        return tables[int(np.argmin(among))]
    return tables[int(np.argmin(costs))]


def _together(maker: _Maker, best: Plan, clock: Clock, executor: Executor | None) -> Plan:
    """Take tables over while slowdown and unevenness of the worst scenarios fall together; never a worse objective."""
    objective, layers = maker.objective, best.num_layers
    tables = list(best.slots)
    seconds = np.stack([maker.seconds(at, table) for at, table in enumerate(tables)], axis=1)
    uneven = np.stack([maker.uneven(at, table) for at, table in enumerate(tables)], axis=1)
    limit = float(objective.joined(seconds.sum(1)))
    for sweep in range(_SWEEPS):
        before = _cost(objective, seconds, uneven)
        others = [
            _Others(seconds.sum(1) - seconds[:, at], (uneven.sum(1) - uneven[:, at]) / layers) for at in range(layers)
        ]
        for at, table in solved(maker, others, tables, clock, executor if sweep == 0 else None):
            trial = seconds.copy(), uneven.copy()
            trial[0][:, at], trial[1][:, at] = maker.seconds(at, table), maker.uneven(at, table)
            cheaper = _cost(objective, *trial) < _cost(objective, seconds, uneven)
            if cheaper and float(objective.joined(trial[0].sum(1))) <= limit:
                tables[at], (seconds, uneven) = table, trial
            maker.report(sweep * layers + at + 1, _SWEEPS * layers)
        if clock.out or _cost(objective, seconds, uneven) > before * (1.0 - 1e-4):
            break
    return replace(best, slots=tuple(tables))


def _cost(objective: Objective, seconds: Array, uneven: Array) -> float:
    return float(objective.joined(seconds.sum(1))) + WORST_BALANCE * float(uneven.mean(1).max())
