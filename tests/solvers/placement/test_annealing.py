"""Annealing all layers at once: near a hidden balance of many scenarios, never worse than its start, always valid."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.placement.auto.annealing import AnnealTask, anneal, can_anneal
from regraft.solvers.placement.auto.layer import Effort, LayerTask
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.solve import solve
from regraft.solvers.placement.baselines.simple import random_plan
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.constraints import Constraints, violations
from regraft.solvers.placement.metrics import evaluate
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.slots import uniform_slots
from regraft.solvers.placement.trace import Batch, Trace
from tests.solvers.placement.cases import TWO_BY_TWO, objective_of, random_trace

FOUR = Cluster.uniform(1, 4)


def hidden_balance(scenarios: int = 5, layers: int = 2, experts: int = 16, ranks: int = 4, seed: int = 0) -> Trace:
    """Counts for which one placement gives every rank the same load in every scenario."""
    generator = np.random.default_rng(seed)
    order = np.stack([generator.permutation(experts) for _ in range(layers)])
    batches = []
    for scenario in range(scenarios):
        counts = np.empty((layers, experts), dtype=np.int64)
        for layer in range(layers):
            share = generator.dirichlet(np.ones(experts // ranks), size=ranks)
            loads = np.floor(share * 1000).astype(np.int64)
            loads[:, 0] += 1000 - loads.sum(1)
            counts[layer, order[layer]] = loads.reshape(-1)
        batches.append(Batch(counts, scenario=f"s{scenario}"))
    return Trace(experts, 2, tuple(range(layers)), tuple(batches))


def tasks(objective: Objective, plan: Plan, constraints: Constraints) -> tuple[LayerTask, ...]:
    none = np.zeros(len(objective.workload.scenarios))
    return tuple(
        LayerTask(objective, at, table.shape[1], (table,), constraints.groups,
                  constraints.pins(objective.model.layer_ids[at]), none, Effort(), 0, None)
        for at, table in enumerate(plan.slots)
    )  # fmt: skip


def test_a_hidden_balance_of_many_scenarios_is_nearly_found() -> None:
    objective = objective_of(hidden_balance(), FOUR, "per-expert", aggregate="min-max")
    found = solve(objective, uniform_slots(objective.model, FOUR), options=Options(time_limit=None))
    assert evaluate(found.plan, objective).worst_balancedness >= 0.93
    assert found.value <= min(found.baselines.values())


@given(
    seed=st.integers(0, 1000),
    communication=st.sampled_from(["dispatch", "per-expert"]),
    redundant=st.sampled_from([0, 4]),
    constraints=st.sampled_from([{}, {"groups": "node"}, {"pinned": {(0, 5): 3}}]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_tables_are_valid_and_cost_no_more_than_the_start(
    seed: int, communication: str, redundant: int, constraints: dict[str, Any]
) -> None:
    objective = objective_of(hidden_balance(seed=seed), TWO_BY_TWO, communication, aggregate="min-max")
    slots = uniform_slots(objective.model, TWO_BY_TWO, redundant)
    limits = Constraints(**constraints)
    start = random_plan(objective.model, TWO_BY_TWO, slots, seed)
    if violations(start, objective.model, TWO_BY_TWO, limits):
        limits = Constraints()
    found = Plan(16, start.layer_ids, 2, anneal(AnnealTask(tasks(objective, start, limits), 300, seed, None)))
    assert not violations(found, objective.model, TWO_BY_TWO, limits)
    assert (found.replicas == start.replicas).all()
    worst = [1.0 / evaluate(plan, objective).worst_balancedness + objective.value(plan) for plan in (found, start)]
    assert worst[0] <= worst[1] * (1.0 + 1e-9)


def test_chains_in_parallel_give_the_same_plan() -> None:
    objective = objective_of(hidden_balance(), FOUR, "per-expert", aggregate="min-max")
    slots = uniform_slots(objective.model, FOUR)
    options = Options(time_limit=None, effort=Effort(rounds=0, programs=0, swaps=20))
    with ThreadPoolExecutor(2) as executor:
        parallel = solve(objective, slots, options=options, executor=executor)
    assert (parallel.plan.array == solve(objective, slots, options=options).plan.array).all()


def test_no_time_gives_the_start() -> None:
    objective = objective_of(hidden_balance(), FOUR, aggregate="min-max")
    start = random_plan(objective.model, FOUR, uniform_slots(objective.model, FOUR))
    found = anneal(AnnealTask(tasks(objective, start, Constraints()), 1000, 0, 0.0))
    assert all((np.sort(new, 1) == np.sort(old, 1)).all() for new, old in zip(found, start.slots, strict=True))


@pytest.mark.parametrize("communication", ["dispatch", "resident"])
def test_tokens_whose_choices_are_known_are_left_to_the_exact_search(communication: str) -> None:
    assert not can_anneal(objective_of(random_trace(), TWO_BY_TWO, communication, aggregate="min-max"))
    assert can_anneal(objective_of(random_trace(), TWO_BY_TWO, "per-expert", aggregate="min-max"))
