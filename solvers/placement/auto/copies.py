"""Which experts the copies are of: a copy is given up for one of another expert while the plan gets cheaper.

Swaps leave the number of an expert's copies as it is; this changes it, a slot at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from regraft.solvers.placement.auto.search import Search
from regraft.solvers.placement.plan import Plan, Slots

#: Copies that carry least and experts whose copies carry most, of which all pairs are tried; and most passes.
_TRIED, _PASSES = 16, 4


def exchange_copies(search: Search, plan: Plan, cost: Callable[[Plan, int], float]) -> Plan:
    """The plan with the best exchange of every layer made, again and again; ``cost`` is of a plan where one layer may
    differ. Plans whose router groups stay whole are left as they are.
    """
    if search.constraints.groups != "free":
        return plan
    for _ in range(_PASSES):
        changed = False
        for at in range(plan.num_layers):
            least = cost(plan, at) * (1.0 - 1e-9)
            before = plan
            for table in _exchanges(search, before, at):
                if search.clock.out:
                    return plan
                trial = replace(before, slots=(*before.slots[:at], table, *before.slots[at + 1 :]))
                own = cost(trial, at)
                if own < least:
                    plan, least, changed = trial, own, True
        if not changed:
            break
    return plan


def _exchanges(search: Search, plan: Plan, at: int) -> Iterator[Slots]:
    """Tables of the layer with one copy exchanged; pinned experts and only copies stay."""
    table, copies = plan.slots[at], plan.replicas[at]
    carried = search.objective.workload.mean_counts[at] / np.maximum(copies, 1)
    pins = search.pins(at)
    spare = [
        (float(carried[expert]), rank, slot)
        for (rank, slot), expert in np.ndenumerate(table)
        if copies[expert] > 1 and pins.get(int(expert)) != rank
    ]
    wanted = np.argsort(-carried, kind="stable")[:_TRIED]
    for _, rank, slot in sorted(spare)[:_TRIED]:
        for expert in wanted:
            if expert not in table[rank]:
                exchanged = table.copy()
                exchanged[rank, slot] = expert
                yield exchanged
