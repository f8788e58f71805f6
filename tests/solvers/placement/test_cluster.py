"""Clusters from files and presets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from regraft.solvers.placement.cluster import PRESETS, Cluster, cluster_of, preset, read_cluster
from regraft.solvers.placement.errors import PlacementError

FILE = """
name = "two"
gpus_per_node = [2, 1]
[link]
intra_bandwidth = 100
inter_bandwidth = 10
inter_latency = 7
[gpu]
memory = [80, 80, 40]
speed = 1.0
"""


def test_a_file_gives_nodes_links_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(FILE)
    cluster = read_cluster(path)
    assert cluster.node_of_rank.tolist() == [0, 0, 1] and cluster.memory.tolist() == [80e9, 80e9, 40e9]
    assert cluster.graph.edges[0, 1]["bandwidth"] == 100e9 and cluster.graph.edges[0, 2]["bandwidth"] == 10e9
    assert cluster.graph.nodes[2]["node"] == 1 and cluster.worst_latency == pytest.approx(7e-6)
    assert cluster.node_bandwidth[0, 1] == 10e9  # one GPU on the other side to receive
    assert np.isinf(cluster.rank_bandwidth[2])


def test_a_matrix_takes_the_place_of_links() -> None:
    matrix = [[0, 50, 5], [50, 0, 5], [5, 5, 0]]
    cluster = cluster_of({"gpus_per_node": [2, 1], "matrix": {"bandwidth": matrix}})
    assert cluster.rank_bandwidth[:2].tolist() == [50e9, 50e9]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    cluster = preset(name)
    assert cluster.num_ranks == cluster.graph.number_of_nodes()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "without gpus_per_node"),
        ({"gpus_per_node": 0}, "at least one GPU"),
        ({"gpus_per_node": 2, "gpu": {"memory": [1, 2, 3]}}, "memory for 3 ranks"),
        ({"gpus_per_node": 2, "link": {"intra_bandwidth": -1}}, "expected positive"),
        ({"gpus_per_node": 2, "colour": "red"}, "colour"),
        ({"gpus_per_node": [2, 2], "nodes": 3}, "3 nodes"),
        ({"preset": "h800"}, "expected one of"),
    ],
)
def test_what_is_wrong_is_said(facts: dict[str, object], said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        cluster_of(facts)


def test_nodes_must_be_contiguous() -> None:
    base = Cluster.uniform(1, 2)
    with pytest.raises(PlacementError, match="follow each other"):
        Cluster(np.array([1, 0]), base.bandwidth, base.latency, base.memory, base.speed, 1.0, 1.0)
