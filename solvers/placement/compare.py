"""The solver ``auto`` beside every baseline: the same workload, the same slots, every figure of each."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.solve import Solution, solve
from regraft.solvers.placement.baselines.all import NAMES, baseline
from regraft.solvers.placement.baselines.moetuner import moetuner
from regraft.solvers.placement.constraints import Constraints, violations
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.metrics import Metrics, evaluate
from regraft.solvers.placement.migration import keep_slots
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.slots import SlotCounts

#: Parts of the time limit that MoETuner's programs get: the first for all layers together, and the second.
_CLUSTER_PART, _MAP_PART = 0.25, 0.25
_MOST_CLUSTER_SECONDS, _MOST_MAP_SECONDS = 5.0, 30.0


@dataclass(frozen=True)
class Row:
    """One method: its plan, the seconds it took, its figures, and the constraints that its plan breaks."""

    method: str
    plan: Plan
    seconds: float
    #: Distance of the objective from the bound, as a part of the objective.
    gap: float
    planned: Metrics
    held_out: Metrics | None
    broken: tuple[str, ...]

    @property
    def scored(self) -> Metrics:
        """Figures on held-out batches, or on the planned ones where none were held out."""
        return self.planned if self.held_out is None else self.held_out

    def figures(self) -> dict[str, Any]:
        """The main figures as plain numbers: seconds, copies per token and layer, bytes."""
        found: dict[str, Any] = {
            "method": self.method,
            "seconds": self.seconds,
            "gap": self.gap,
            "broken": list(self.broken),
            "planned": _figures(self.planned),
        }
        if self.held_out is not None:
            found["held_out"] = _figures(self.held_out)
        return found


@dataclass(frozen=True)
class Comparison:
    """``rows`` begin with ``auto``; ``skipped`` says why a baseline is missing."""

    solution: Solution
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    @property
    def auto(self) -> Row:
        """The solver's own row."""
        return self.rows[0]

    def row(self, method: str) -> Row | None:
        """A method's row, None where it was skipped."""
        return next((row for row in self.rows if row.method == method), None)

    def better_than_auto(self) -> list[str]:
        """Methods with a lower objective, whether or not their plans satisfy the constraints."""
        least = self.auto.planned.objective * (1.0 - 1e-9)
        return [row.method for row in self.rows[1:] if row.planned.objective < least]


def compare(
    objective: Objective,
    slots: SlotCounts,
    constraints: Constraints | None = None,
    options: Options | None = None,
    executor: Executor | None = None,
    held_out: Objective | None = None,
) -> Comparison:
    """Run every baseline that fits, then ``auto`` with MoETuner's plan among its starts, and score all of them.

    ``held_out`` is the same objective on a workload that was not planned on. The time limit is for ``auto``; MoETuner's
    programs get at most half as much before, and are left out where it is 0. Raises ``PlacementError`` where no plan
    can satisfy the constraints.
    """
    constraints, options = constraints or Constraints(), options or Options()
    made, skipped = _baselines(objective, slots, options)
    starts = {name: plan for name, (plan, _) in made.items() if name == "moetuner"}
    solution = solve(objective, slots, constraints, options, executor, starts)
    entries = [("auto", _settled(solution.plan, objective, constraints), solution.seconds)]
    entries += [(name, *entry) for name, entry in made.items()]
    if constraints.current is not None:
        entries.append(("current", constraints.current, 0.0))
    rows = tuple(_row(entry, objective, held_out, constraints, solution.bound) for entry in entries)
    return Comparison(solution, rows, skipped)


def _settled(plan: Plan, objective: Objective, constraints: Constraints) -> Plan:
    """The plan with experts that stay on a rank in the slots that they have there, where groups stay whole so."""
    if constraints.current is None:
        return plan
    kept = keep_slots(constraints.current, plan)
    return plan if violations(kept, objective.model, objective.cluster, constraints) else kept


def _baselines(
    objective: Objective, slots: SlotCounts, options: Options
) -> tuple[dict[str, tuple[Plan, float]], dict[str, str]]:
    """Plans and seconds by name, and why others are missing."""
    made: dict[str, tuple[Plan, float]] = {}
    skipped: dict[str, str] = {}
    for name in (*NAMES, "random", "moetuner"):
        if name == "eplb-hierarchical" and objective.cluster.num_nodes == 1:
            continue  # the same as the global form
        started = time.monotonic()
        try:
            plan = _moetuner(objective, slots, options) if name == "moetuner" else baseline(name, objective, slots)
        except PlacementError as error:
            skipped[name] = str(error)
            continue
        made[name] = plan, time.monotonic() - started
    return made, skipped


def _moetuner(objective: Objective, slots: SlotCounts, options: Options) -> Plan:
    if options.time_limit is None:
        return moetuner(objective, slots)
    if options.time_limit <= 0.0:
        raise PlacementError("MoETuner's integer programs were left no time; give a time limit above 0")
    each = _CLUSTER_PART * options.time_limit / objective.model.num_layers
    return moetuner(
        objective,
        slots,
        seconds_per_layer=min(_MOST_CLUSTER_SECONDS, each),
        seconds_to_map=min(_MOST_MAP_SECONDS, _MAP_PART * options.time_limit),
    )


def _row(
    entry: tuple[str, Plan, float],
    objective: Objective,
    held_out: Objective | None,
    constraints: Constraints,
    bound: float,
) -> Row:
    method, plan, seconds = entry
    current = constraints.current
    planned = evaluate(plan, objective, current if method != "current" else None)
    return Row(
        method,
        plan,
        seconds,
        (planned.objective - bound) / planned.objective if planned.objective > 0 else 0.0,
        planned,
        None if held_out is None else evaluate(plan, held_out),
        tuple(violations(plan, objective.model, objective.cluster, constraints)),
    )


def _figures(metrics: Metrics) -> dict[str, Any]:
    return {
        "objective": metrics.objective,
        "balancedness": metrics.balancedness,
        "worst_balancedness": metrics.worst_balancedness,
        "cross_node_copies": metrics.cross_node_copies,
        "destination_ranks": metrics.destination_ranks,
        "layer_p50": metrics.layer_p50,
        "layer_p95": metrics.layer_p95,
        "layer_p99": metrics.layer_p99,
        "memory_per_rank": metrics.memory_per_rank,
        "scenarios": {row.name: row.balancedness for row in metrics.scenarios},
    }
