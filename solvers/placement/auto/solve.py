"""The solver ``auto``: the best plan found, never worse than a baseline, with a lower bound and why it stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from regraft.solvers.placement.auto.bounds import bound
from regraft.solvers.placement.auto.cells import cells_of, pin
from regraft.solvers.placement.auto.chain import improve_chain
from regraft.solvers.placement.auto.descent import Clock
from regraft.solvers.placement.auto.independent import improve_layers
from regraft.solvers.placement.auto.items import items_of, ranks_of, table_of
from regraft.solvers.placement.auto.layer import Effort
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.packing import level, pack_items
from regraft.solvers.placement.auto.restrained import improve_within_moves
from regraft.solvers.placement.auto.search import Search
from regraft.solvers.placement.auto.together import improve_together
from regraft.solvers.placement.baselines.all import quick_baselines
from regraft.solvers.placement.constraints import Constraints, check_memory, check_pins, validate, violations
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.repair import duplicates, refilled, without_duplicates
from regraft.solvers.placement.slots import SlotCounts


@dataclass(frozen=True)
class Solution:
    """A plan, its objective, a bound that no plan with these slots goes below, and how far apart these are.

    ``stop`` is "optimal" (the gap is closed), "time limit", or "effort" (everything that was to be tried was tried).
    ``baselines`` are the objectives of the baselines as their authors make them, valid or not.
    """

    plan: Plan
    value: float
    bound: float
    gap: float
    stop: str
    seconds: float
    baselines: dict[str, float]
    notes: tuple[str, ...] = ()


def solve(
    objective: Objective,
    slots: SlotCounts,
    constraints: Constraints | None = None,
    options: Options | None = None,
    executor: Executor | None = None,
    starts: Mapping[str, Plan] | None = None,
) -> Solution:
    """Plan with ``slots`` per rank in each layer (``uniform_slots`` or ``budgeted_slots``).

    ``starts`` are more baselines by name, with these slots (MoETuner's, or a plan from elsewhere): the result is not
    worse than those of them that satisfy the constraints. With an ``executor`` layers that do not depend on each other
    are solved in parallel. Raises ``PlacementError`` where no plan can satisfy the constraints; a time limit of 0 still
    gives the best of the baselines.
    """
    constraints, options = constraints or Constraints(), options or Options()
    started, clock = time.monotonic(), Clock.after(options.time_limit)
    _check(objective, slots, constraints)
    below = bound(objective, slots)
    raw = {**quick_baselines(objective, slots), **_fitting(objective, slots, starts or {})}
    values = {name: objective.value(plan) for name, plan in raw.items()}
    candidates = _valid_starts(objective, slots, constraints, raw)
    reference = candidates.get("eplb-hierarchical" if "eplb" not in candidates else "eplb")
    best = min(candidates.values(), key=objective.value)
    stop = "optimal" if values_close(objective.value(best), below) else "effort"
    if stop != "optimal" and not clock.out:
        best = _improved(
            Search(objective, slots, constraints, options, clock, executor, candidates, best, reference, raw)
        )
    value = objective.value(best)
    if values_close(value, below):
        stop = "optimal"
    elif clock.out:
        stop = "time limit"
    validate(best, objective.model, objective.cluster, constraints)
    named = replace(best, method="auto", model_name=objective.model.name)
    gap = (value - below) / value if value > 0 else 0.0
    return Solution(named, value, below, gap, stop, time.monotonic() - started, values, _notes(constraints, reference))


def _fitting(objective: Objective, slots: SlotCounts, starts: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans that were given, checked. Raises ``PlacementError`` for one of another model, cluster or slots."""
    for name, plan in starts.items():
        objective.check_plan(plan)
        if plan.slots_per_rank != tuple(int(size) for size in slots):
            raise PlacementError(
                f"plan {name!r} has {plan.slots_per_rank[0]} slots per rank and was given to start from; "
                f"expected {int(slots[0])}, as many as are planned for"
            )
    return dict(starts)


def values_close(value: float, below: float) -> bool:
    """Whether a bound is reached, but for rounding."""
    return value <= below * (1.0 + 1e-6)


def _check(objective: Objective, slots: SlotCounts, constraints: Constraints) -> None:
    model, cluster = objective.model, objective.cluster
    if len(slots) != model.num_layers:
        raise PlacementError(f"slots for {len(slots)} layers were given for {model.num_layers} expert layers")
    for layer, size in zip(model.layer_ids, slots, strict=True):
        if size * cluster.num_ranks < model.num_experts or size > model.num_experts:
            raise PlacementError(
                f"layer {layer} has {size} slots on each of {cluster.num_ranks} ranks for {model.num_experts} experts; "
                "expected room for every expert and no expert twice on a rank"
            )
    check_memory(slots, model, cluster, constraints)
    check_pins(constraints, model, cluster)
    for (layer, expert), rank in constraints.pinned.items():
        size = int(slots[model.layer_ids.index(layer)])
        together = sum(1 for (other, _), place in constraints.pinned.items() if other == layer and place == rank)
        if together > size:
            raise PlacementError(
                f"{together} experts of layer {layer} are pinned to rank {rank} (expert {expert} among them); "
                f"it has {size} slots: pin fewer"
            )
    if constraints.current is not None:
        objective.check_plan(constraints.current)


def _valid_starts(
    objective: Objective, slots: SlotCounts, constraints: Constraints, raw: dict[str, Plan]
) -> dict[str, Plan]:
    """The baselines made valid (no second copy on a rank), those that then satisfy all constraints, and one that does
    by construction. With a bound on moves, the plan in service alone.
    """
    model, cluster = objective.model, objective.cluster
    if constraints.max_moves is not None and constraints.current is not None:
        loose = replace(constraints, current=None, max_moves=None)
        validate(constraints.current, model, cluster, loose)
        return {"current": constraints.current}
    mended = {name: plan for own, made in raw.items() for name, plan in _mended(own, made, objective).items()}
    if constraints.current is not None:
        mended["current"] = constraints.current
    found = {name: plan for name, plan in mended.items() if not violations(plan, model, cluster, constraints)}
    if constraints.current is not None and constraints.current.slots_per_rank != tuple(int(s) for s in slots):
        found.pop("current", None)
    packed = _packed(objective, slots, constraints)
    if not found or not violations(packed, model, cluster, constraints):
        found["packed"] = packed
    return found


def _mended(name: str, plan: Plan, objective: Objective) -> dict[str, Plan]:
    """The plan without second copies on a rank: these swapped away, or given up for copies of other experts."""
    mean = objective.workload.mean_counts
    swapped, filled = [], []
    for at, table in enumerate(plan.slots):
        load = mean[at] / np.maximum(plan.replicas[at], 1)
        swapped.append(np.sort(without_duplicates(table, plan.num_experts, load), axis=1))
        filled.append(np.sort(refilled(table, plan.num_experts, mean[at]), axis=1))
    found = {name: replace(plan, slots=tuple(swapped))}
    if any(duplicates(table) for table in plan.slots):
        found[f"{name} refilled"] = replace(plan, slots=tuple(filled))
    return found


def _packed(objective: Objective, slots: SlotCounts, constraints: Constraints) -> Plan:
    """Replicas by load, then longest processing time first, within cells; pins kept."""
    model, cluster = objective.model, objective.cluster
    tables: list[Slots] = []
    for at, size in enumerate(slots):
        cells = cells_of(objective, at, int(size), constraints.groups)
        items = items_of(objective, at, cells.count)
        rank = pack_items(
            items.weight, items.expert, cells.cell_of_item(items), cells.cell_of_rank, cluster.speed, int(size)
        )
        rank = level(items.weight, items.expert, rank, cells.cell_of_rank, cluster.speed)
        table = table_of(rank, items, cluster.num_ranks)
        if constraints.groups == "free":
            table = without_duplicates(
                table, model.num_experts, items.weight[np.unique(items.expert, return_index=True)[1]]
            )
        items = items_of(objective, at, np.bincount(table.reshape(-1), minlength=model.num_experts))
        rank = pin(ranks_of(table, items), items.expert, constraints.pins(model.layer_ids[at]))
        tables.append(table_of(rank, items, cluster.num_ranks))
    return Plan(model.num_experts, model.layer_ids, model.num_hidden_layers, tuple(tables), model.name, "packed")


def _improved(search: Search) -> Plan:
    options = replace(search.options, effort=_enough(search))
    search = replace(search, options=options, keep=search.keep if _balance_counts(search) else None)
    if search.constraints.max_moves is not None:
        return improve_within_moves(search)
    if search.objective.chained:
        return improve_chain(search)
    return improve_together(search) if search.objective.aggregate == "min-max" else improve_layers(search)


def _enough(search: Search) -> Effort:
    """More kicks where there are fewer slots in all: every problem gets about as many evaluations of swaps."""
    largest = 16_000
    slots = int(search.slots.sum()) * search.objective.cluster.num_ranks
    more = int(np.clip(largest / max(slots, 1), 1, 20))
    effort = search.options.effort
    return replace(effort, rounds=effort.rounds * more)


def _balance_counts(search: Search) -> bool:
    """Equal token counts are an aim only where ranks are equally fast and scenarios are averaged."""
    objective = search.objective
    even = objective.aggregate == "weighted" and bool(np.ptp(objective.cluster.speed) == 0.0)
    return search.options.keep_balance and even


def _notes(constraints: Constraints, reference: Plan | None) -> tuple[str, ...]:
    if reference is None and constraints.max_moves is None:
        return ("EPLB's plan breaks the constraints; balance was not compared with it",)
    return ()
