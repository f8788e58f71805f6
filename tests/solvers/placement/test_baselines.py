"""EPLB against its published example and its stated rules; MoETuner's programs against trying everything."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from regraft.solvers.placement.baselines.all import baseline, quick_baselines
from regraft.solvers.placement.baselines.eplb import balance_layer, eplb, pack, replicate
from regraft.solvers.placement.baselines.moetuner import cluster_experts, map_clusters, moetuner
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.slots import uniform_slots
from tests.solvers.placement.cases import EPLB_LOADS, EPLB_SLOTS, TWO_BY_TWO, objective_of, planted, random_trace


def test_eplb_gives_its_published_example() -> None:
    model = MoeModel.simple(2, 12, 2, num_groups=4)
    cluster = Cluster.uniform(2, 4)
    plan = eplb(model, cluster, uniform_slots(model, cluster, 4), EPLB_LOADS)
    assert plan.array.tolist() == EPLB_SLOTS and plan.method == "eplb-hierarchical"


def test_eplb_global_is_one_group_on_one_node() -> None:
    model = MoeModel.simple(2, 12, 2, num_groups=3)  # 2 nodes do not divide 3 groups
    cluster = Cluster.uniform(2, 4)
    plan = eplb(model, cluster, uniform_slots(model, cluster, 4), EPLB_LOADS)
    assert (plan.slots[0] == balance_layer(EPLB_LOADS[0], 16, 1, 1, 8)).all() and plan.method == "eplb"
    with pytest.raises(PlacementError, match="use the global form"):
        eplb(model, cluster, uniform_slots(model, cluster, 4), EPLB_LOADS, hierarchical=True)


def test_packing_fills_the_lightest_pack_that_has_room() -> None:
    packs, _ = pack(np.array([9.0, 5.0, 4.0, 1.0]), 2)
    assert packs.tolist() == [0, 1, 1, 0]
    copies, count = replicate(np.array([9.0, 4.0, 3.0]), 5)
    assert copies.tolist() == [0, 1, 2, 0, 0] and count.tolist() == [3, 1, 1]


def test_clusters_deviate_least_from_the_mean() -> None:
    """The printed problem has clusters of any size: a hot expert may be alone."""
    load = np.array([90.0, 30, 30, 30, 10, 10])
    found = cluster_experts(load, 2)
    every = [np.array(c) for c in product(range(2), repeat=6) if 0 < sum(c) < 6]
    deviation = [abs(load[c == 0].sum() - 100) + abs(load[c == 1].sum() - 100) for c in every]
    own = abs(load[found == 0].sum() - 100) + abs(load[found == 1].sum() - 100)
    assert own <= min(deviation) + 0.025 * 100
    equal = cluster_experts(load, 2, equal=True)
    assert np.bincount(equal).tolist() == [3, 3]


def test_mapping_makes_the_largest_pair_smallest() -> None:
    generator = np.random.default_rng(1)
    moves = generator.random((2, 6, 6))
    cluster = Cluster.uniform(3, 1, inter_bandwidth=1e9)
    clusters = [np.repeat(np.arange(3), 2)] * 3
    flows = [np.add.reduceat(np.add.reduceat(m, [0, 2, 4], 0), [0, 2, 4], 1) for m in moves]

    def cost(places: tuple[tuple[int, ...], ...]) -> float:
        total = 0.0
        for at, flow in enumerate(flows):
            pairs = np.zeros((3, 3))
            pairs[np.ix_(places[at], places[at + 1])] = flow
            total += (pairs * (1 - np.eye(3))).max()
        return total

    best = min(cost(places) for places in product(permutations(range(3)), repeat=3))
    found = map_clusters(clusters, moves, cluster)
    assert cost(tuple(tuple(int(g) for g in place) for place in found)) <= best * 1.03


def test_moetuner_places_every_expert_once_or_says_why_not() -> None:
    objective = objective_of(planted(layers=2).trace, TWO_BY_TWO, "resident")
    slots = uniform_slots(objective.model, TWO_BY_TWO)
    plan = moetuner(objective, slots, seconds_per_layer=2.0, seconds_to_map=4.0)
    assert (plan.replicas == 1).all() and set(plan.slots_per_rank) == {8}
    printed = moetuner(objective, slots, equal=False, seconds_per_layer=1.0, seconds_to_map=1.0)
    assert (printed.replicas == 1).all()
    with pytest.raises(PlacementError, match="no redundant slots"):
        moetuner(objective, uniform_slots(objective.model, TWO_BY_TWO, 4))
    wide = Cluster.uniform(2, 16)
    large = objective_of(planted(layers=2).trace, wide, "resident")
    with pytest.raises(PlacementError, match="1048576 products"):
        moetuner(large, uniform_slots(large.model, wide))


def test_baselines_by_name() -> None:
    objective = objective_of(random_trace(), TWO_BY_TWO, num_groups=2)
    slots = uniform_slots(objective.model, TWO_BY_TWO)
    assert list(quick_baselines(objective, slots)) == ["contiguous", "round-robin", "eplb", "eplb-hierarchical"]
    assert baseline("random", objective, slots, 3).method == "random"
    with pytest.raises(PlacementError, match="expected one of"):
        baseline("magic", objective, slots)
