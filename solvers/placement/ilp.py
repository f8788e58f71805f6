"""Integer programs through pulp: HiGHS with a warm start, or CBC where HiGHS is not there."""

from __future__ import annotations

import math
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pulp

from regraft.solvers.placement.errors import PlacementError


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``status`` "optimal", "feasible" (stopped by a limit) or "none" (no solution found)."""

    status: str
    value: float
    bound: float


def solve(
    program: pulp.LpProblem,
    seconds: float = math.inf,
    gap: float = 1e-4,
    nodes: int | None = None,
    start: dict[str, float] | None = None,
) -> Outcome:
    """Solve in place; variables then hold the solution. ``nodes`` limits branch and bound, ``start`` is a warm start.

    A limit of nodes, unlike one of seconds, gives the same result on every machine.
    """
    if seconds <= 0:
        return Outcome("none", math.nan, -math.inf)
    for variable in program.variables():
        if start is not None and variable.name in start:
            variable.setInitialValue(start[variable.name])
    highs = pulp.HiGHS(msg=False, threads=1, gapRel=gap, timeLimit=None if math.isinf(seconds) else seconds)
    if highs.available():
        return _with_highs(program, highs, nodes, start)
    return _with_cbc(program, seconds, gap, nodes)


def _with_highs(
    program: pulp.LpProblem, solver: pulp.HiGHS, nodes: int | None, start: dict[str, float] | None
) -> Outcome:
    """pulp's own steps one by one: only between building and solving can a start be handed over."""
    import highspy

    _load_quietly()
    solver.createAndConfigureSolver(program)
    solver.buildSolverModel(program)
    model = program.solverModel
    if nodes is not None:
        model.setOptionValue("mip_max_nodes", nodes)
    if start is not None:
        solution = highspy.HighsSolution()
        solution.col_value = [start.get(variable.name, 0.0) for variable in program.variables()]
        model.setSolution(solution)
    model.run()
    information = model.getInfo()
    if information.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome("none", math.nan, -math.inf)
    for variable, value in zip(program.variables(), model.getSolution().col_value, strict=True):
        variable.varValue = round(value) if variable.cat == pulp.LpInteger else value
    done = model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return Outcome("optimal" if done else "feasible", information.objective_function_value, information.mip_dual_bound)


@cache
def _load_quietly() -> None:
    """HiGHS greets on the process's standard output when it is first made, whatever its options: not in our output."""
    import highspy

    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            highspy.Highs()  # type: ignore[no-untyped-call]
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _with_cbc(program: pulp.LpProblem, seconds: float, gap: float, nodes: int | None) -> Outcome:
    solver = pulp.PULP_CBC_CMD(
        msg=False,
        threads=1,
        gapRel=gap,
        timeLimit=None if math.isinf(seconds) else seconds,
        maxNodes=nodes,
        warmStart=True,
    )
    if not solver.available():
        raise PlacementError("no integer-program solver was found; install highspy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program.solve(solver)
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Outcome("none", math.nan, -math.inf)
    value = float(pulp.value(program.objective))
    done = program.sol_status == pulp.LpSolutionOptimal
    return Outcome("optimal" if done else "feasible", value, value if done else -math.inf)
