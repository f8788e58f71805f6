"""The solver: never worse than a baseline, near the hidden optimum, valid under constraints, the same for a seed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regraft.solvers.placement.auto.layer import Effort
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.replicas import budgeted_slots
from regraft.solvers.placement.auto.solve import Solution, solve
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.constraints import Constraints, moves, validate
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.metrics import evaluate
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.slots import uniform_slots
from regraft.solvers.placement.synthetic import power_law_trace
from regraft.solvers.placement.trace import Batch, Trace
from tests.solvers.placement.cases import TWO_BY_TWO, objective_of, planted, random_trace

QUICK = Options(time_limit=None, effort=Effort(steps=40, rounds=0, programs=1, swaps=50))


def solved(objective: Objective, redundant: int = 0, options: Options = QUICK, **facts: Any) -> Solution:
    slots = uniform_slots(objective.model, objective.cluster, redundant)
    found = solve(objective, slots, Constraints(**facts) if facts else None, options)
    validate(found.plan, objective.model, objective.cluster, Constraints(**facts))
    assert found.bound <= found.value * (1 + 1e-9)
    assert found.value == pytest.approx(objective.value(found.plan))
    return found


@given(
    seed=st.integers(0, 1000),
    communication=st.sampled_from(["dispatch", "per-expert", "resident"]),
    split=st.sampled_from(["even", "nearest"]),
    redundant=st.sampled_from([0, 4]),
    aggregate=st.sampled_from(["weighted", "min-max"]),
)
@example(seed=355, communication="resident", split="even", redundant=4, aggregate="weighted")
@example(seed=13, communication="dispatch", split="even", redundant=4, aggregate="weighted")
@settings(max_examples=8, deadline=None, derandomize=True)
def test_never_worse_than_a_baseline(seed: int, communication: str, split: str, redundant: int, aggregate: str) -> None:
    """Also than EPLB's with two copies on a rank (355), and where co-activation brings copies together (13)."""
    trace = random_trace(seed, experts=16, top_k=3)
    named = replace(trace, batches=tuple(replace(b, scenario="ab"[n % 2]) for n, b in enumerate(trace.batches)))
    objective = objective_of(named, TWO_BY_TWO, communication, split=split, aggregate=aggregate)
    found = solved(objective, redundant)
    assert found.value <= min(found.baselines.values()) * (1 + 1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_coactivation_is_found(seed: int) -> None:
    hidden = planted(seed)
    plan_on, score_on = hidden.trace.split(0.5)
    objective = objective_of(plan_on, TWO_BY_TWO)
    held_out = objective.with_workload(objective_of(score_on, TWO_BY_TWO).workload)
    found = solved(objective)
    assert found.value <= objective.value(hidden.plan(4)) * 1.03
    best = evaluate(found.plan, held_out)
    usual = evaluate(baseline_plan(objective), held_out)
    assert best.cross_node_copies <= 0.75 * usual.cross_node_copies
    assert evaluate(found.plan, objective).balancedness >= evaluate(baseline_plan(objective), objective).balancedness


def baseline_plan(objective: Objective) -> Any:
    from regraft.solvers.placement.baselines.all import baseline

    return baseline("eplb", objective, uniform_slots(objective.model, objective.cluster))


@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_affinity_between_layers_is_found(seed: int) -> None:
    hidden = planted(seed, layers=4, groups=4, parts=1, affinity=0.95)
    objective = objective_of(hidden.trace, TWO_BY_TWO, "resident")
    found = solved(objective)
    assert found.value <= objective.value(hidden.plan(4)) * 1.03
    usual = evaluate(baseline_plan(objective), objective)
    assert evaluate(found.plan, objective).cross_node_copies <= 0.75 * usual.cross_node_copies


def test_layers_in_parallel_give_the_same_plan_and_a_seed_always_does() -> None:
    objective = objective_of(planted().trace, TWO_BY_TWO)
    slots = uniform_slots(objective.model, TWO_BY_TWO)
    alone = solve(objective, slots, options=QUICK)
    again = solve(objective, slots, options=QUICK)
    with ThreadPoolExecutor(2) as executor:
        parallel = solve(objective, slots, options=QUICK, executor=executor)
    assert (alone.plan.array == again.plan.array).all() and (alone.plan.array == parallel.plan.array).all()


def test_no_time_still_gives_a_valid_plan() -> None:
    objective = objective_of(planted().trace, TWO_BY_TWO)
    found = solved(objective, options=Options(time_limit=0.0))
    assert found.stop == "time limit" and found.value <= min(found.baselines.values()) * (1 + 1e-9)


def test_a_bound_that_is_reached_ends_the_search() -> None:
    """One expert a rank, equal loads, one rank each side: nothing can be better."""
    trace = Trace(2, 1, (0,), (Batch(np.array([[50, 50]])),))
    objective = objective_of(trace, Cluster.uniform(1, 2), "per-expert")
    assert solved(objective).stop == "optimal"


def test_scenarios_are_served_alike_under_min_max() -> None:
    """Each domain uses its own half of the experts: the mean is level whatever the halves do."""
    hot = np.array([[100, 100, 100, 100, 1, 1, 1, 1]])
    trace = Trace(8, 2, (0,), (Batch(hot, scenario="a"), Batch(hot[:, ::-1].copy(), scenario="b")))
    cluster = Cluster.uniform(1, 4, flops=1e12)
    found = solved(objective_of(trace, cluster, aggregate="min-max"))
    metrics = evaluate(found.plan, objective_of(trace, cluster, aggregate="min-max"))
    assert min(row.balancedness for row in metrics.scenarios) == pytest.approx(1.0)


def test_pinned_experts_stay_where_they_are_pinned() -> None:
    objective = objective_of(planted().trace, TWO_BY_TWO)
    found = solved(objective, pinned={(0, 5): 3, (0, 6): 3, (2, 1): 0})
    assert {5, 6} <= set(found.plan.slots[0][3]) and 1 in found.plan.slots[2][0]


@pytest.mark.parametrize("mode", ["node", "block"])
@pytest.mark.parametrize("communication", ["dispatch", "resident"])
def test_router_groups_stay_whole(mode: str, communication: str) -> None:
    objective = objective_of(planted().trace, TWO_BY_TWO, communication, num_groups=4)
    found = solved(objective, groups=mode)
    assert found.value <= objective.value(found.plan) * (1 + 1e-9)


def test_groups_that_nodes_do_not_divide_are_refused() -> None:
    objective = objective_of(planted().trace, Cluster.uniform(4, 1), num_groups=2)
    with pytest.raises(PlacementError, match="2 router groups were to be kept whole on 4 nodes"):
        solved(objective, groups="node")
    with pytest.raises(PlacementError, match="expected no redundant slots"):
        solved(objective, 4, groups="block")


@pytest.mark.parametrize("communication", ["dispatch", "resident"])
@pytest.mark.parametrize("most", [0, 6])
def test_few_moves_improve_the_plan_in_service(communication: str, most: int) -> None:
    objective = objective_of(planted().trace, TWO_BY_TWO, communication)
    current = baseline_plan(objective)
    found = solved(objective, current=current, max_moves=most)
    assert moves(current, found.plan) <= most
    if most:
        assert found.value < objective.value(current)


def test_memory_that_does_not_suffice_is_refused_by_how_much() -> None:
    objective = objective_of(random_trace(), TWO_BY_TWO)
    with pytest.raises(PlacementError, match=r"memory: 6 expert slots need 0.264 GB .* 0.064 GB too little"):
        solved(objective, memory=0.2e9)


def test_a_memory_budget_is_spent_where_it_balances() -> None:
    even, hot = np.full(8, 100), np.array([800, 10, 10, 10, 10, 10, 10, 10])
    trace = Trace(8, 1, (0, 1), (Batch(np.stack([even, hot])),))
    objective = objective_of(trace, TWO_BY_TWO)
    room = Constraints(memory=5.5 * objective.model.expert_bytes)
    slots = budgeted_slots(objective, room)
    assert slots.tolist() == [2, 3]
    found = solve(objective, slots, room, QUICK)
    validate(found.plan, objective.model, TWO_BY_TWO, room)
    assert found.plan.replicas[1, 0] > 1


def test_slow_ranks_get_cold_experts() -> None:
    cluster = Cluster.of_nodes([4], (153e9, 46e9), (2e-6, 1e-5), speed=[1.0, 1.0, 1.0, 0.25], flops=1e12)
    trace = power_law_trace(1, 16, 2, batches=4, tokens=2000, drift=0.0)
    objective = objective_of(trace, cluster)
    found = solved(objective)
    loads = objective.loads(0, 0, found.plan.slots[0]).tokens.mean(0)
    assert loads[3] < 0.5 * loads[:3].min()


def test_unequal_nodes_are_planned_for() -> None:
    cluster = Cluster.of_nodes([3, 1], (153e9, 46e9), (2e-6, 1e-5))
    solved(objective_of(planted().trace, cluster), 4)


def test_progress_is_told() -> None:
    told: list[float] = []
    objective = objective_of(planted().trace, TWO_BY_TWO)
    solved(objective, options=replace(QUICK, progress=told.append))
    assert told == sorted(told) and told[-1] == 1.0
