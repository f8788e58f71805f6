"""The small exact methods against trying everything: assignment, chains, knapsack, integer programs."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.placement import chain_assignment, ilp
from regraft.solvers.placement.assignment import assign
from regraft.solvers.placement.auto.bounds import smallest_copy
from regraft.solvers.placement.auto.replicas import replica_counts
from regraft.solvers.placement.chain_assignment import assign_chain, chain_cost
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.knapsack import choose

SEEDS = st.integers(0, 10_000)


@given(seed=SEEDS, size=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_assignment_is_the_cheapest_of_all_permutations(seed: int, size: int) -> None:
    cost = np.random.default_rng(seed).integers(-5, 9, (size, size)).astype(np.float64)
    found = assign(cost)
    assert sorted(found) == list(range(size))
    assert cost[np.arange(size), found].sum() == min(
        cost[np.arange(size), list(p)].sum() for p in permutations(range(size))
    )


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_chain_of_few_ranks_is_exact(seed: int) -> None:
    generator = np.random.default_rng(seed)
    flows, cost = generator.random((2, 3, 3)), generator.random((3, 3))
    every = [np.array(p) for p in permutations(range(3))]
    best = min(chain_cost(flows, cost, np.stack(places)) for places in product(every, repeat=3))
    assert chain_cost(flows, cost, assign_chain(flows, cost)) == pytest.approx(best)


def test_chain_sweeps_find_a_hidden_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_assignment, "EXACT_RANKS", 1)
    generator = np.random.default_rng(0)
    follows = [generator.permutation(8) for _ in range(5)]
    flows = np.stack([np.eye(8)[p] for p in follows])
    cost = 1.0 - np.eye(8)
    assert chain_cost(flows, cost, assign_chain(flows, cost)) == 0.0


@given(seed=SEEDS, budget=st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_knapsack_is_the_best_of_all_choices(seed: int, budget: int) -> None:
    generator = np.random.default_rng(seed)
    costs = [np.array([0, *generator.integers(0, 5, 2)]) for _ in range(3)]
    values = [generator.random(3) for _ in range(3)]
    picks = choose(costs, values, budget)
    assert sum(int(cost[pick]) for cost, pick in zip(costs, picks, strict=True)) <= budget
    every = [
        sum(value[pick] for value, pick in zip(values, each, strict=True))
        for each in product(range(3), repeat=3)
        if sum(int(cost[pick]) for cost, pick in zip(costs, each, strict=True)) <= budget
    ]
    assert sum(value[pick] for value, pick in zip(values, picks, strict=True)) == pytest.approx(min(every))


@given(seed=SEEDS, extra=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_replicas_minimise_the_largest_copy_and_the_bound_is_it(seed: int, extra: int) -> None:
    load = np.random.default_rng(seed).integers(1, 100, 4).astype(np.float64)
    count = replica_counts(load, 4 + extra, 4)
    assert count.sum() == 4 + extra and count.max() <= 4
    every = [np.array(c) for c in product(range(1, 5), repeat=4) if sum(c) == 4 + extra]
    best = min(float((load / c).max()) for c in every)
    assert (load / count).max() == pytest.approx(best)
    assert smallest_copy(load[None], 4 + extra, 4)[0] == pytest.approx(best, rel=1e-6)


def test_more_copies_than_ranks_are_refused() -> None:
    with pytest.raises(PlacementError, match="at most 2 copies"):
        replica_counts(np.ones(3), 7, 2)


def halves() -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
    """Split 3, 5, 7, 2, 8, 6 into halves that are as equal as can be: 16 and 15."""
    program = pulp.LpProblem("halves", pulp.LpMinimize)
    taken = [pulp.LpVariable(f"x{n}", cat=pulp.LpBinary) for n in range(6)]
    most = pulp.LpVariable("most", lowBound=0.0)
    program += most
    sizes = (3, 5, 7, 2, 8, 6)
    program += pulp.lpSum(s * x for s, x in zip(sizes, taken, strict=True)) <= most
    program += pulp.lpSum(s * (1 - x) for s, x in zip(sizes, taken, strict=True)) <= most
    return program, taken


@pytest.mark.parametrize("highs", [True, False], ids=["highs", "cbc"])
def test_programs_are_solved_by_either_solver(
    highs: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: highs)
    program, taken = halves()
    start = {"most": 18.0, **{f"x{n}": float(n % 2) for n in range(6)}}
    outcome = ilp.solve(program, start=start)
    assert outcome.status == "optimal" and outcome.value == pytest.approx(16) and outcome.bound == pytest.approx(16)
    assert all(variable.varValue in (0, 1) for variable in taken)
    assert ilp.solve(program, seconds=0.0).status == "none"
    assert capfd.readouterr().out == ""


def test_an_impossible_program_has_no_solution() -> None:
    program, taken = halves()
    program += pulp.lpSum(taken) >= 7
    assert ilp.solve(program).status == "none"
