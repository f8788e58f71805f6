"""Traffic against counting tokens one by one; modelled time against its formula; metrics against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.placement.baselines.simple import contiguous, random_plan
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.metrics import evaluate
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.slots import uniform_slots
from regraft.solvers.placement.split import Copies, nearest_slots, slot_shares, token_copy
from regraft.solvers.placement.trace import Batch, Trace
from regraft.solvers.placement.traffic import count_traffic
from regraft.solvers.placement.workload import workload_of
from tests.solvers.placement.cases import TWO_BY_TWO, objective_of, random_experts, random_trace


def counted(
    table: np.ndarray[Any, Any], experts: np.ndarray[Any, Any], sources: list[int], split: str
) -> tuple[Any, Any]:
    """Copies between ranks and nodes, token by token."""
    cluster = TWO_BY_TWO
    copies = Copies.of(table, 8)
    nearest = nearest_slots(copies, cluster)
    ranks, nodes = np.zeros((4, 4), dtype=int), np.zeros((2, 2), dtype=int)
    for token, (chosen, source) in enumerate(zip(experts, sources, strict=True)):
        served = set()
        for expert in chosen.tolist():
            if split == "even":
                index = int(token_copy(np.array(token), np.array(expert), copies.count[expert]))
                slot = int(copies.slots[expert, index])
            else:
                slot = int(nearest[source, expert])
            served.add(slot // table.shape[1])
        for rank in served - {source}:
            ranks[source, rank] += 1
        for node in {rank // 2 for rank in served} - {source // 2}:
            nodes[source // 2, node] += 1
    return ranks, nodes


@given(seed=st.integers(0, 30), split=st.sampled_from(["even", "nearest"]), extra=st.sampled_from([0, 4]))
@settings(max_examples=25, deadline=None)
def test_traffic_is_what_counting_token_by_token_gives(seed: int, split: str, extra: int) -> None:
    trace = random_trace(seed)
    objective = objective_of(trace, TWO_BY_TWO)
    table = random_plan(objective.model, TWO_BY_TWO, uniform_slots(objective.model, TWO_BY_TWO, extra), seed).slots[0]
    experts = random_experts(seed, 1, 30, 8, 2)[0]
    sources = np.random.default_rng(seed).integers(0, 4, 30)
    found = count_traffic(table, experts, 8, TWO_BY_TWO, sources, split)
    ranks, nodes = counted(table, experts, sources.tolist(), split)
    assert (found.ranks == ranks).all() and (found.nodes == nodes).all()
    messages = count_traffic(table, experts, 8, TWO_BY_TWO, sources, split, "per-expert")
    assert messages.crossing >= found.crossing and messages.cross_node >= found.cross_node


def test_tokens_may_be_numbered_by_their_own_rank_s_call() -> None:
    """Two ranks of three tokens: together they are the traffic of each by itself."""
    table = np.array([[0, 1], [2, 0], [0, 3], [1, 2]])
    experts = random_experts(0, 1, 6, 4, 2)[0]
    sources, numbers = np.repeat([1, 3], 3), np.tile(np.arange(3), 2)
    found = count_traffic(table, experts, 4, TWO_BY_TWO, sources, tokens=numbers)
    alone = [count_traffic(table, experts[part], 4, TWO_BY_TWO, sources[part]) for part in (slice(3), slice(3, 6))]
    assert (found.ranks == alone[0].ranks + alone[1].ranks).all()


def test_copies_share_tokens_evenly_and_nearest_is_nearest() -> None:
    table = np.array([[0, 1], [2, 0], [0, 3], [1, 2]])
    assert slot_shares(table, TWO_BY_TWO, "even", 4)[0, 0] == pytest.approx(1 / 3)
    copy = token_copy(np.arange(30000), np.full(30000, 5), np.full(30000, 3))
    assert np.bincount(copy) == pytest.approx(np.full(3, 10000), rel=0.05)
    nearest = nearest_slots(Copies.of(table, 4), TWO_BY_TWO) // 2
    assert nearest[:, 0].tolist() == [0, 1, 2, 2]  # own rank, own rank, own rank, the only one in the node
    assert nearest[:, 3].tolist() == [2, 2, 2, 2] and set(nearest[:2, 1]) == {0} and set(nearest[2:, 1]) == {3}


def test_layer_time_is_slowest_rank_and_busiest_port() -> None:
    """Two ranks, each a node; tokens whose two experts lie apart reach both, the others one."""
    cluster = Cluster.uniform(2, 1, inter_bandwidth=1e9, inter_latency=3e-6)
    chosen = np.array([[[0, 1]] * 6 + [[0, 2]] * 2])
    trace = Trace(4, 2, (0,), (Batch.of_tokens(chosen, 4),))
    objective = objective_of(trace, cluster)
    plan = Plan.of_array(np.array([[0, 1, 2, 3]]), 4, 2)
    model = objective.model
    tokens = 14  # choices on rank 0: six tokens twice, two once
    busy = max(tokens * model.expert_flops / cluster.flops, 2 * model.expert_bytes / cluster.memory_bandwidth)
    size = model.dispatch_bytes + model.combine_bytes
    port = size * 8 * 0.5 / 1e9  # all eight tokens reach rank 0, half of them from the other node
    assert objective.value(plan) == pytest.approx(busy + cluster.launch + port + 2 * 3e-6)
    messages = objective_of(trace, cluster, "per-expert").value(plan)
    assert messages == pytest.approx(busy + cluster.launch + size * 14 * 0.5 / 1e9 + 2 * 3e-6)


def test_resident_tokens_pay_for_hops_only() -> None:
    chosen = np.array([[[0]] * 6 + [[2]] * 2, [[1]] * 6 + [[3]] * 2])
    trace = Trace(4, 1, (0, 1), (Batch.of_tokens(chosen, 4),))
    cluster = Cluster.uniform(2, 1, inter_bandwidth=1e9)
    objective = objective_of(trace, cluster, "resident")
    stays = Plan.of_array(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2)
    hops = Plan.of_array(np.array([[0, 1, 2, 3], [2, 3, 0, 1]]), 4, 2)
    assert objective.hops(0, 1, stays.slots[0], stays.slots[1]).tolist() == [[0.75, 0.0], [0.0, 0.25]]
    extra = objective.value(hops) - objective.value(stays)
    assert extra == pytest.approx(6 * objective.model.combine_bytes / 1e9)
    with pytest.raises(PlacementError, match="no transitions"):
        objective_of(Trace(4, 1, (0,), (Batch(np.ones((1, 4), dtype=np.int64)),)), cluster, "resident")


def test_min_max_is_the_largest_slowdown() -> None:
    first = Batch(np.array([[40, 0, 0, 0]]), scenario="a")
    second = Batch(np.array([[1000, 1000, 1000, 1000]]), scenario="b")
    trace = Trace(4, 1, (0,), (first, second))
    cluster = Cluster.uniform(1, 2, flops=1e9)
    objective = objective_of(trace, cluster, aggregate="min-max")
    plan = Plan.of_array(np.array([[0, 1, 2, 3]]), 4, 2)
    metrics = evaluate(plan, objective)
    assert metrics.objective == max(row.slowdown for row in metrics.scenarios) == metrics.scenarios[0].slowdown


def test_metrics_are_what_their_names_say() -> None:
    trace = random_trace(batches=4)
    objective = objective_of(trace, TWO_BY_TWO)
    plan = contiguous(objective.model, TWO_BY_TWO, uniform_slots(objective.model, TWO_BY_TWO))
    loads = np.stack([batch.counts.reshape(3, 4, 2).sum(2) for batch in trace.batches])
    row = evaluate(plan, objective, current=plan).scenarios[0]
    assert row.balancedness == pytest.approx((loads.mean(2) / loads.max(2)).mean())
    assert row.balancedness_summed == pytest.approx(loads.mean(2).sum() / loads.max(2).sum())
    assert row.imbalance == pytest.approx(((loads.max(2) - loads.mean(2)) / loads.mean(2)).mean())
    experts = np.concatenate([batch.experts for batch in trace.batches if batch.experts is not None], axis=1)
    reached = np.stack([(experts // 4 == node).any(2) for node in range(2)])
    assert row.cross_node_copies == pytest.approx(reached.sum(0).mean() / 2)
    ranks = np.stack([(experts // 2 == rank).any(2) for rank in range(4)])
    assert row.destination_ranks == pytest.approx(ranks.sum(0).mean())
    assert row.layer_p50 <= row.layer_p95 <= row.layer_p99
    whole = evaluate(plan, objective, current=plan)
    assert whole.migration is not None and whole.migration.experts == 0
    assert whole.load.shape == (1, 3, 4) and whole.traffic.shape == (2, 2)
    assert whole.memory_per_rank == 6 * objective.model.expert_bytes and "load" not in whole.to_dict()


def test_known_sources_are_used() -> None:
    """All tokens on rank 0, all experts wanted there: nothing crosses."""
    chosen = np.zeros((1, 8, 1), dtype=np.int32)
    trace = Trace(4, 1, (0,), (Batch.of_tokens(chosen, 4, np.zeros(8, dtype=np.int32)),))
    objective = objective_of(trace, TWO_BY_TWO)
    plan = Plan.of_array(np.array([[0, 1, 2, 3]]), 4, 4)
    assert evaluate(plan, objective).cross_node_copies == 0.0


def test_a_trace_or_plan_of_another_model_is_refused() -> None:
    objective = objective_of(random_trace(), TWO_BY_TWO)
    with pytest.raises(PlacementError, match="of another model"):
        objective.with_workload(workload_of(random_trace(experts=16)))
    with pytest.raises(PlacementError, match="another model"):
        objective.value(Plan.of_array(np.arange(16).reshape(1, 16), 16, 4))
    with pytest.raises(PlacementError, match="expected one of dispatch"):
        objective_of(random_trace(), TWO_BY_TWO, "telepathy")
