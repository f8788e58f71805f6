"""Plans and their file; every constraint has a plan that breaks it, and is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.placement.baselines.simple import contiguous, random_plan, round_robin
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.constraints import Constraints, check_memory, moves, validate, violations
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.migration import keep_slots, migration
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.repair import duplicates, without_duplicates
from regraft.solvers.placement.slots import uniform_slots
from tests.solvers.placement.cases import TWO_BY_TWO

ROWS = st.permutations(range(8))
EXTRA = st.lists(st.integers(0, 7), min_size=4, max_size=4)
MODEL = MoeModel(8, 2, (3, 4), 5, num_groups=4, expert_bytes=10.0)
PLAN = Plan.of_array(np.tile(np.arange(8), (2, 1)), 8, 4, (3, 4), 5)


def with_row(row: list[int]) -> Plan:
    return Plan.of_array(np.array([row, range(len(row))]) % 8, 8, 4, (3, 4), 5)


def test_a_plan_file_gives_the_plan_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    found = Plan.load(path)
    assert (found.array == PLAN.array).all() and found.layer_ids == (3, 4) and found.num_hidden_layers == 5
    assert json.loads(path.read_text())["version"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "x"}, "format 'x'"),
        ({"num_ranks": 7}, "plan for 7 ranks"),
        ({"layers": [{"layer_id": 0, "slots": [[0, 1], [2]]}]}, "unequal slots"),
        ({"num_experts": 5}, "places expert 7"),
        ({"layers": 3}, "cannot be read"),
    ],
)
def test_a_wrong_plan_file_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        Plan.from_json(json.dumps({**json.loads(PLAN.to_json()), **change}))


@pytest.mark.parametrize(
    ("plan", "constraints", "said"),
    [
        (with_row([0, 1, 2, 3, 4, 5, 6, 6]), Constraints(), "no copy of expert 7"),
        (with_row([0, 1, 2, 3, 4, 5, 6, 6]), Constraints(), "expert 6 twice on rank 3"),
        (with_row([0, 2, 1, 3, 4, 5, 6, 7]), Constraints(groups="block"), "breaks up router groups"),
        (with_row([0, 7, 1, 3, 4, 5, 6, 2]), Constraints(groups="node"), "spreads router group"),
        (PLAN, Constraints(memory=39.0), "too much"),
        (PLAN, Constraints(pinned={(3, 0): 2}), "expert 0 on rank 2"),
        (PLAN, Constraints(current=with_row([0, 2, 1, 3, 4, 5, 6, 7]), max_moves=1), "at most 1"),
        (replace(PLAN, layer_ids=(1, 2)), Constraints(), "expert layers are 3 to 4"),
        (replace(PLAN, num_experts=9), Constraints(), "the model has 8"),
    ],
)  # fmt: skip
def test_broken_constraints_are_named(plan: Plan, constraints: Constraints, said: str) -> None:
    assert any(said in found for found in violations(plan, MODEL, TWO_BY_TWO, constraints))
    with pytest.raises(PlacementError):
        validate(plan, MODEL, TWO_BY_TWO, constraints)


def test_a_plan_that_keeps_blocks_whole_is_valid() -> None:
    swapped_groups = with_row([2, 3, 0, 1, 5, 4, 6, 7])
    validate(swapped_groups, MODEL, TWO_BY_TWO, Constraints(groups="block"))
    validate(swapped_groups, MODEL, TWO_BY_TWO, Constraints(groups="node"))


def test_memory_is_checked_by_how_much_it_lacks() -> None:
    slots = uniform_slots(MODEL, TWO_BY_TWO)
    with pytest.raises(PlacementError, match=r"4 expert slots need 0.000 GB .* too little"):
        check_memory(slots, MODEL, TWO_BY_TWO, Constraints(memory=39.0))
    check_memory(slots, MODEL, TWO_BY_TWO, Constraints(memory=40.0))


def test_sizes_that_do_not_divide_say_what_would() -> None:
    with pytest.raises(PlacementError, match="use 1 redundant"):
        uniform_slots(MODEL, Cluster.uniform(1, 3))
    with pytest.raises(PlacementError, match="no rank may hold an expert twice"):
        uniform_slots(MODEL, Cluster.uniform(1, 2), 16)


@given(seed=st.integers(0, 50), ranks=st.sampled_from([2, 4, 8]), extra=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_simple_baselines_hold_every_expert(seed: int, ranks: int, extra: int) -> None:
    cluster = Cluster.uniform(1, ranks)
    slots = uniform_slots(MODEL, cluster, extra * ranks if 8 // ranks + extra <= 8 else 0)
    for plan in (round_robin(MODEL, cluster, slots), random_plan(MODEL, cluster, slots, seed)):
        validate(plan, MODEL, cluster)
    assert (contiguous(MODEL, cluster, slots).replicas >= 1).all()


@given(row=ROWS, extra=EXTRA)
@settings(max_examples=60, deadline=None)
def test_second_copies_are_mended_and_no_expert_is_lost(row: list[int], extra: list[int]) -> None:
    table = np.array([*row, *extra]).reshape(4, 3)
    mended = without_duplicates(table, 8)
    assert not duplicates(mended) and set(mended.reshape(-1)) == set(range(8))


def test_moves_and_migration_count_what_a_rank_newly_holds() -> None:
    after = with_row([2, 1, 0, 3, 4, 5, 6, 7])
    assert moves(PLAN, after) == 2 and moves(PLAN, PLAN) == 0
    within = migration(PLAN, after, MODEL, TWO_BY_TWO, saved_per_batch=1.0)
    assert (within.experts, within.bytes, within.cross_node_bytes) == (2, 20.0, 0.0)
    assert within.seconds == pytest.approx(10.0 / 153e9) and within.payback_batches == pytest.approx(10.0 / 153e9)
    across = migration(PLAN, with_row([4, 1, 2, 3, 0, 5, 6, 7]), MODEL, TWO_BY_TWO)
    assert across.cross_node_bytes == 20.0 and across.payback_batches == float("inf")
    assert migration(PLAN, PLAN, MODEL, TWO_BY_TWO).payback_batches == 0.0


def test_what_stays_on_a_rank_keeps_its_slot() -> None:
    shuffled = with_row([1, 0, 3, 4, 2, 5, 7, 6])
    kept = keep_slots(PLAN, shuffled)
    assert kept.slots[0].tolist() == [[0, 1], [4, 3], [2, 5], [6, 7]]
    assert moves(shuffled, kept) == 0


def test_models_are_read_from_configs() -> None:
    deepseek = {
        "n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168, "num_hidden_layers": 61,
        "first_k_dense_replace": 3, "moe_intermediate_size": 2048, "n_group": 8, "moe_layer_freq": 1,
    }  # fmt: skip
    model = MoeModel.from_config(deepseek, weight_type="fp8")
    assert (model.layer_ids[0], model.layer_ids[-1], model.num_groups) == (3, 60, 8)
    assert model.expert_bytes == pytest.approx(44.0e6, rel=1e-2)
    qwen = {
        "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 8, "num_hidden_layers": 6,
        "decoder_sparse_step": 2, "mlp_only_layers": [3],
    }  # fmt: skip
    assert MoeModel.from_config(qwen).layer_ids == (1, 5)
    with pytest.raises(PlacementError, match="without expert layers"):
        MoeModel.from_config({"hidden_size": 8, "num_hidden_layers": 2})
