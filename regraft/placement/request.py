"""From what a user asks for to a problem, its solution, and a file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regraft.files import replacing
from regraft.placement.executors import executor_of
from regraft.placement.traces import model_of, read_any_trace, read_model
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.cluster import PRESETS, Cluster, preset, read_cluster
from regraft.solvers.placement.compare import Comparison, compare
from regraft.solvers.placement.constraints import Constraints, violations
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.all import export, read_export
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.slots import SlotCounts, uniform_slots
from regraft.solvers.placement.workload import workload_of

OWN_FORM = "regraft"
_GIGABYTE = 1e9


@dataclass(frozen=True)
class Request:
    """What is planned, as named on the command line; ``memory`` in GB per rank, ``time_limit`` in seconds."""

    trace: Path
    topology: str
    config: Path | None = None
    weight_type: str = "bf16"
    top_k: int | None = None
    redundant: int = 0
    memory: float | None = None
    groups: str = "free"
    current: Path | None = None
    max_moves: int | None = None
    communication: str = "dispatch"
    split: str = "even"
    scenarios: str = "scenario"
    aggregate: str = "weighted"
    holdout: float = 0.0
    time_limit: float = 60.0
    seed: int = 0
    executor: str | None = None


@dataclass(frozen=True)
class Problem:
    """A request with its files read; ``assumed`` tells in sentences what nothing said."""

    request: Request
    objective: Objective
    held_out: Objective | None
    constraints: Constraints
    assumed: list[str]


def problem_of(request: Request) -> Problem:
    """Read all files of a request. Raises ``PlacementError`` for what is missing, malformed or contradictory."""
    cluster = read_topology(request.topology)
    given = None if request.config is None else read_model(request.config, request.weight_type)
    trace = read_any_trace(request.trace, given, request.top_k)
    model = model_of(trace, given)
    planned, scored = (trace, None) if request.holdout == 0.0 else trace.split(1.0 - request.holdout)
    objective = Objective(
        model,
        cluster,
        workload_of(planned, request.scenarios),
        request.communication,
        request.split,
        request.aggregate,
    )
    current = None if request.current is None else Plan.load(request.current)
    if current is not None:
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


def solve_problem(problem: Problem, progress: Callable[[float], None] | None = None) -> Comparison:
    """Plan, beside every baseline. Raises ``PlacementError`` where no plan can satisfy the constraints."""
    request = problem.request
    options = Options(request.time_limit, request.seed, progress=progress)
    slots = _slots(problem)
    with executor_of(request.executor) as executor:
        try:
            return compare(problem.objective, slots, problem.constraints, options, executor, problem.held_out)
        except BrokenProcessPool as error:
            raise PlacementError(
                f"a process of executor {request.executor!r} ended early, perhaps for lack of memory; "
                "use fewer processes, or none"
            ) from error


def write_plan(plan: Plan, form: str, path: Path) -> None:
    """Write a plan in our form or an engine's; the file appears whole. Raises ``PlacementError`` where it does not fit
    the engine.
    """
    with replacing(path) as temporary:
        if form == OWN_FORM:
            temporary.write_text(plan.to_json(), encoding="utf-8")
        else:
            export(plan, form, temporary)


def faults_of(
    file: Path, form: str, config: Path, topology: str, weight_type: str, memory: float | None, groups: str
) -> tuple[Plan, list[str]]:
    """A file's plan and every constraint that it breaks. Raises ``PlacementError`` for a file of another form or
    model.
    """
    cluster, model = read_topology(topology), read_model(config, weight_type)
    plan = Plan.load(file) if form == OWN_FORM else read_export(form, file, model, cluster.num_ranks)
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


def _slots(problem: Problem) -> SlotCounts:
    """Uniform slots; under a bound on moves, those of the plan in service."""
    objective, current = problem.objective, problem.constraints.current
    redundant = problem.request.redundant
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
