"""From what a user asks for to a problem, its solution, and a file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from regraft.files import replacing
from regraft.placement.traces import model_of, read_model, stored_trace
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.replicas import budgeted_slots
from regraft.solvers.placement.baselines.moetuner import fits
from regraft.solvers.placement.cluster import PRESETS, Cluster, preset, read_cluster
from regraft.solvers.placement.compare import Comparison, compare
from regraft.solvers.placement.constraints import Constraints, violations
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.all import export, read_export
from regraft.solvers.placement.exports.kinds import OWN_FORM, plan_form
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.readers.stored import PIECE_BYTES, observe_stored
from regraft.solvers.placement.slots import SlotCounts, uniform_slots
from regraft.solvers.placement.statistics import Limits, Statistics
from regraft.solvers.placement.trace import split_numbers
from regraft.solvers.placement.workload import workload_of

_GIGABYTE = 1e9


@dataclass(frozen=True)
class Request:
    """What is planned, as named on the command line; ``memory`` and ``replica_budget`` in GB per rank, ``time_limit``
    in seconds. No more than about ``piece_bytes`` of the trace is read at a time.
    """

    trace: Path
    topology: str
    config: Path | None = None
    weight_type: str = "bf16"
    top_k: int | None = None
    redundant: int = 0
    replica_budget: float | None = None
    memory: float | None = None
    groups: str = "free"
    current: Path | None = None
    current_form: str | None = None
    max_moves: int | None = None
    communication: str = "dispatch"
    split: str = "even"
    scenarios: str = "scenario"
    aggregate: str = "weighted"
    holdout: float = 0.0
    time_limit: float = 60.0
    seed: int = 0
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True)
class Problem:
    """A request with its files read; ``assumed`` tells in sentences what nothing said."""

    request: Request
    objective: Objective
    held_out: Objective | None
    constraints: Constraints
    assumed: list[str]


def problem_of(request: Request, executor: Executor | None = None) -> Problem:
    """Read all files of a request; pieces of a large trace in parallel with an ``executor``.

    Raises ``PlacementError`` for what is missing, malformed or contradictory.
    """
    cluster = read_topology(request.topology)
    given = None if request.config is None else read_model(request.config, request.weight_type)
    planned, scored = _statistics(request, cluster, given, executor)
    model = model_of(planned, given)
    objective = Objective(
        model,
        cluster,
        workload_of(planned, request.scenarios),
        request.communication,
        request.split,
        request.aggregate,
    )
    current = None
    if request.current is not None:
        current = read_plan(request.current, request.current_form, model, cluster.num_ranks)
        objective.check_plan(current)
    return Problem(
        request,
        objective,
        None if scored is None else objective.with_workload(workload_of(scored, request.scenarios)),
        Constraints(
            request.groups,
            memory=None if request.memory is None else request.memory * _GIGABYTE,
            current=current,
            max_moves=request.max_moves,
        ),
        _assumptions(given, model),
    )


def solve_problem(
    problem: Problem, progress: Callable[[float], None] | None = None, executor: Executor | None = None
) -> Comparison:
    """Plan, beside every baseline. Raises ``PlacementError`` where no plan can satisfy the constraints."""
    options = Options(problem.request.time_limit, problem.request.seed, progress=progress)
    return compare(problem.objective, _slots(problem), problem.constraints, options, executor, problem.held_out)


def write_plan(plan: Plan, form: str, path: Path) -> None:
    """Write a plan in our form or an engine's; the file appears whole. Raises ``PlacementError`` where it does not fit
    the engine.
    """
    with replacing(path) as temporary:
        if form == OWN_FORM:
            temporary.write_text(plan.to_json(), encoding="utf-8")
        else:
            export(plan, form, temporary)


def read_plan(path: Path, form: str | None, model: MoeModel, num_ranks: int) -> Plan:
    """A plan in our form or an engine's; without ``form`` it is told by the content. Raises ``PlacementError``."""
    known = plan_form(path) if form is None else form
    return Plan.load(path) if known == OWN_FORM else read_export(known, path, model, num_ranks)


def faults_of(
    file: Path, form: str | None, config: Path, topology: str, weight_type: str, memory: float | None, groups: str
) -> tuple[Plan, list[str]]:
    """A file's plan and every constraint that it breaks. Raises ``PlacementError`` for a file of another form or
    model.
    """
    cluster, model = read_topology(topology), read_model(config, weight_type)
    plan = read_plan(file, form, model, cluster.num_ranks)
    budget = None if memory is None else memory * _GIGABYTE
    return plan, violations(plan, model, cluster, Constraints(groups, memory=budget))


def read_topology(text: str) -> Cluster:
    """The preset of that name, or the cluster that a TOML file describes. Raises ``PlacementError``."""
    if text in PRESETS:
        return preset(text)
    if not Path(text).exists():
        raise PlacementError(
            f"topology {text!r} is neither a file nor a preset; give a TOML file or one of {', '.join(PRESETS)}"
        )
    return read_cluster(text)


def _statistics(
    request: Request, cluster: Cluster, given: MoeModel | None, executor: Executor | None
) -> tuple[Statistics, Statistics | None]:
    """Of the batches that are planned on, and of those that are held out. Transitions take long to count: only where
    the communication model or MoETuner's programs need them.
    """
    stored = stored_trace(request.trace, given, request.top_k)
    wanted = request.communication == "resident" or fits(cluster.num_ranks, stored.num_layers)
    limits = Limits(coactivation=False, transitions=wanted)
    observe = partial(observe_stored, stored, limits=limits, executor=executor, piece_bytes=request.piece_bytes)
    if request.holdout == 0.0:
        return observe(), None
    planned, scored = split_numbers(stored.scenarios, 1.0 - request.holdout)
    return observe(planned), observe(scored)


def _slots(problem: Problem) -> SlotCounts:
    """Uniform slots, or as a budget for copies buys; under a bound on moves, those of the plan in service."""
    objective, request = problem.objective, problem.request
    current, redundant = problem.constraints.current, request.redundant
    if request.replica_budget is not None:
        return budgeted_slots(objective, problem.constraints, budget=request.replica_budget * _GIGABYTE)
    if problem.constraints.max_moves is None or current is None:
        return uniform_slots(objective.model, objective.cluster, redundant)
    slots = np.array(current.slots_per_rank, dtype=np.int64)
    if redundant and (slots * current.num_ranks != current.num_experts + redundant).any():
        raise PlacementError(
            f"{redundant} redundant slots were asked for, and the plan in service has "
            f"{int(slots[0]) * current.num_ranks - current.num_experts}; with a bound on moves slots stay as they are: "
            "leave --redundant out"
        )
    return slots


def _assumptions(given: MoeModel | None, model: MoeModel) -> list[str]:
    if given is not None:
        return []
    return [
        f"without --config, experts of {model.expert_bytes / 1e6:.0f} MB and tokens of "
        f"{model.dispatch_bytes / 1e3:.1f} kB are assumed (DeepSeek-V3 in FP8)"
    ]
