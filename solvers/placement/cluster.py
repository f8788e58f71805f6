"""The machine that experts are placed on: ranks (one a GPU) in nodes, the links between them, memory and speed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """Ranks ``0..num_ranks - 1``; those of a node follow each other. Bandwidth in bytes/s, latency in seconds.

    ``bandwidth[source, destination]`` is what one rank can send to another; between nodes it is the rank's share of
    the network. The diagonal is not used. ``speed`` multiplies ``flops`` (floating point operations per second that
    expert layers reach) and ``memory_bandwidth``.
    """

    node_of_rank: NDArray[np.int64]
    bandwidth: NDArray[np.float64]
    latency: NDArray[np.float64]
    memory: Vector
    speed: Vector
    flops: float
    memory_bandwidth: float
    #: Fixed time of a layer on any rank, seconds.
    launch: float = 10e-6
    name: str = ""

    def __post_init__(self) -> None:
        ranks = len(self.node_of_rank)
        if ranks == 0:
            raise PlacementError("a cluster without ranks was given; expected at least one node with one GPU")
        if (
            (np.diff(self.node_of_rank) < 0).any()
            or self.node_of_rank[0] != 0
            or (np.diff(self.node_of_rank) > 1).any()
        ):
            raise PlacementError("the ranks of a node must follow each other; expected nodes numbered 0, 1, …")
        for what, shape in (("bandwidth", (ranks, ranks)), ("latency", (ranks, ranks)), ("memory", (ranks,))):
            if getattr(self, what).shape != shape:
                raise PlacementError(f"{what} of shape {getattr(self, what).shape} was given; expected {shape}")
        if self.speed.shape != (ranks,):
            raise PlacementError(f"speeds of {self.speed.shape} were given; expected one a rank, {ranks}")
        links = self.bandwidth[~np.eye(ranks, dtype=bool)]
        for what, values in (("bandwidth", links), ("memory", self.memory), ("speed", self.speed)):
            if values.size and not (values > 0).all():
                raise PlacementError(f"a {what} of {values.min()} was given; expected positive numbers")
        if not (self.latency >= 0).all() or self.flops <= 0 or self.memory_bandwidth <= 0:
            raise PlacementError("latencies must not be negative, and flops and memory bandwidth must be positive")

    @property
    def num_ranks(self) -> int:
        """GPUs of the cluster."""
        return len(self.node_of_rank)

    @cached_property
    def node_sizes(self) -> NDArray[np.int64]:
        """Ranks of each node."""
        return np.bincount(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        """Nodes of the cluster."""
        return len(self.node_sizes)

    @cached_property
    def same_node(self) -> NDArray[np.bool_]:
        """``[ranks, ranks]``: whether two ranks lie in one node."""
        return np.equal.outer(self.node_of_rank, self.node_of_rank)

    @cached_property
    def membership(self) -> NDArray[np.float64]:
        """``[ranks, nodes]``: 1 where the rank lies in the node."""
        return np.eye(self.num_nodes)[self.node_of_rank]

    @cached_property
    def node_bandwidth(self) -> NDArray[np.float64]:
        """``[nodes, nodes]``, bytes/s: all ranks of a node sending at once; infinite within a node."""
        member = self.membership
        pairs = np.outer(self.node_sizes, self.node_sizes)
        mean = member.T @ np.where(np.eye(self.num_ranks, dtype=bool), 0.0, self.bandwidth) @ member / pairs
        total = mean * np.minimum.outer(self.node_sizes, self.node_sizes)
        np.fill_diagonal(total, np.inf)
        return total

    @cached_property
    def rank_bandwidth(self) -> Vector:
        """``[ranks]``, bytes/s into each rank from its node's others (harmonic mean); infinite where it is alone."""
        inside = self.same_node & ~np.eye(self.num_ranks, dtype=bool)
        peers = inside.sum(0)
        inverse = np.where(inside, 1.0 / np.where(inside, self.bandwidth, 1.0), 0.0).sum(0)
        return np.where(peers > 0, peers / np.where(peers > 0, inverse, 1.0), np.inf)

    @cached_property
    def worst_latency(self) -> float:
        """The longest latency between two ranks, seconds."""
        return float(self.latency.max(initial=0.0, where=~np.eye(self.num_ranks, dtype=bool)))

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Nodes are ranks (``node``, ``memory``, ``speed``); edges are links (``bandwidth``, ``latency``)."""
        graph = nx.DiGraph(name=self.name)
        for rank in range(self.num_ranks):
            facts = {"memory": float(self.memory[rank]), "speed": float(self.speed[rank])}
            graph.add_node(rank, node=int(self.node_of_rank[rank]), **facts)
        for source in range(self.num_ranks):
            for target in range(self.num_ranks):
                if source != target:
                    link = {
                        "bandwidth": float(self.bandwidth[source, target]),
                        "latency": float(self.latency[source, target]),
                    }
                    graph.add_edge(source, target, **link)
        return graph

    @classmethod
    def uniform(
        cls,
        nodes: int,
        gpus_per_node: int,
        intra_bandwidth: float = 153e9,
        inter_bandwidth: float = 46e9,
        intra_latency: float = 2e-6,
        inter_latency: float = 10e-6,
        memory: float = 80e9,
        flops: float = 500e12,
        memory_bandwidth: float = 3.35e12,
        name: str = "",
    ) -> Cluster:
        """Equal nodes. Bandwidths default to what DeepEP reports on H800 (153 GB/s NVLink, 43 to 58 GB/s network)."""
        if nodes < 1 or gpus_per_node < 1:
            raise PlacementError(f"{nodes} nodes of {gpus_per_node} GPUs were given; expected at least one of each")
        return cls.of_nodes(
            [gpus_per_node] * nodes,
            (intra_bandwidth, inter_bandwidth),
            (intra_latency, inter_latency),
            memory=memory,
            flops=flops,
            memory_bandwidth=memory_bandwidth,
            name=name or f"{nodes}x{gpus_per_node}",
        )

    @classmethod
    def of_nodes(
        cls,
        sizes: list[int],
        bandwidth: tuple[float, float],
        latency: tuple[float, float],
        memory: float | list[float] = 80e9,
        speed: float | list[float] = 1.0,
        flops: float = 500e12,
        memory_bandwidth: float = 3.35e12,
        name: str = "",
    ) -> Cluster:
        """Nodes of these sizes; bandwidth and latency as (inside a node, between nodes)."""
        if not sizes or min(sizes) < 1:
            raise PlacementError(f"nodes of {sizes} GPUs were given; expected at least one GPU in each")
        node = np.repeat(np.arange(len(sizes)), sizes)
        same = node[:, None] == node[None, :]
        ranks = len(node)
        return cls(
            node,
            np.where(same, bandwidth[0], bandwidth[1]).astype(np.float64),
            np.where(same, latency[0], latency[1]).astype(np.float64),
            _per_rank(memory, ranks, "memory"),
            _per_rank(speed, ranks, "speed"),
            flops,
            memory_bandwidth,
            name=name,
        )


def _per_rank(value: float | list[float], ranks: int, what: str) -> Vector:
    values = np.asarray(value, dtype=np.float64)
    if values.ndim == 0:
        return np.full(ranks, float(values))
    if values.shape != (ranks,):
        raise PlacementError(f"{what} for {values.size} ranks was given; expected {ranks}, one a GPU, or one number")
    return values


#: One node of eight H100, several of them over InfiniBand, and one rack of 72 GPUs in a single NVLink domain.
PRESETS: dict[str, Cluster] = {
    "h100x8": Cluster.uniform(1, 8, name="h100x8"),
    "h100x16": Cluster.uniform(2, 8, name="h100x16"),
    "h100x32": Cluster.uniform(4, 8, name="h100x32"),
    "h100x64": Cluster.uniform(8, 8, name="h100x64"),
    "nvl72": Cluster.uniform(
        1, 72, 700e9, intra_latency=3e-6, memory=186e9, flops=2000e12, memory_bandwidth=8e12, name="nvl72"
    ),
}

_KEYS = {"name", "nodes", "gpus_per_node", "link", "gpu", "matrix", "preset"}


def read_cluster(path: Path | str) -> Cluster:
    """Read a cluster from a TOML file. Raises ``PlacementError`` for what is missing, unknown or contradictory.

    ::

        name = "two nodes"
        nodes = 2                    # or: gpus_per_node = [8, 4]
        gpus_per_node = 8
        [link]                       # gigabytes per second and microseconds
        intra_bandwidth = 153
        inter_bandwidth = 46
        intra_latency = 2
        inter_latency = 10
        [gpu]                        # gigabytes, and a number or a list with one number a GPU
        memory = 80
        speed = 1.0
        teraflops = 500
        memory_bandwidth = 3350
        [matrix]                     # instead of [link]: one row a GPU
        bandwidth = [[...], ...]
        latency = [[...], ...]

    or ``preset = "h100x16"`` alone.
    """
    path = Path(path)
    try:
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlacementError(f"cluster file {path.name!r} cannot be read: {error}; expected TOML") from error
    try:
        return cluster_of(facts)
    except PlacementError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise PlacementError(
            f"cluster file {path.name!r} has a value of the wrong kind: {error}; expected numbers and lists of numbers"
        ) from error


def cluster_of(facts: Mapping[str, Any]) -> Cluster:
    """The cluster that a TOML file's contents describe; see ``read_cluster``."""
    unknown = set(facts) - _KEYS
    if unknown:
        raise PlacementError(f"cluster keys {sorted(unknown)} were given; expected only {', '.join(sorted(_KEYS))}")
    if "preset" in facts:
        return preset(str(facts["preset"]))
    per_node = facts.get("gpus_per_node")
    if per_node is None:
        raise PlacementError("a cluster without gpus_per_node was given; expected a number or one number a node")
    sizes = (
        [int(size) for size in per_node] if isinstance(per_node, list) else [int(per_node)] * int(facts.get("nodes", 1))
    )
    if isinstance(per_node, list) and "nodes" in facts and facts["nodes"] != len(sizes):
        raise PlacementError(
            f"{facts['nodes']} nodes were given with gpus_per_node for {len(sizes)}; expected one each"
        )
    link, gpu = facts.get("link", {}), facts.get("gpu", {})
    base = Cluster.of_nodes(
        sizes,
        (1e9 * float(link.get("intra_bandwidth", 153)), 1e9 * float(link.get("inter_bandwidth", 46))),
        (1e-6 * float(link.get("intra_latency", 2)), 1e-6 * float(link.get("inter_latency", 10))),
        memory=_scaled(gpu.get("memory", 80), 1e9),
        speed=_scaled(gpu.get("speed", 1.0), 1.0),
        flops=1e12 * float(gpu.get("teraflops", 500)),
        memory_bandwidth=1e9 * float(gpu.get("memory_bandwidth", 3350)),
        name=str(facts.get("name", "")),
    )
    return _with_matrix(base, facts["matrix"]) if "matrix" in facts else base


def preset(name: str) -> Cluster:
    """A named cluster. Raises ``PlacementError`` for a name that there is none of."""
    if name not in PRESETS:
        raise PlacementError(f"cluster preset {name!r} was named; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _scaled(value: Any, unit: float) -> float | list[float]:
    return [unit * float(entry) for entry in value] if isinstance(value, list) else unit * float(value)


def _with_matrix(base: Cluster, matrix: Mapping[str, Any]) -> Cluster:
    bandwidth = np.asarray(matrix.get("bandwidth", base.bandwidth / 1e9), dtype=np.float64) * 1e9
    latency = np.asarray(matrix.get("latency", base.latency * 1e6), dtype=np.float64) * 1e-6
    return Cluster(
        base.node_of_rank,
        bandwidth,
        latency,
        base.memory,
        base.speed,
        base.flops,
        base.memory_bandwidth,
        name=base.name,
    )
