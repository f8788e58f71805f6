"""From copies to seconds: which port of the cluster is busiest.

Ports are each node's links out and in (all its ranks' network together) and each rank's links inside its node. Where
source ranks are not known they are spread evenly, and a node's or rank's traffic follows from how many tokens reach it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ports:
    """Seconds per byte of one copy for every token that reaches a place, sources spread evenly.

    ``nodes`` is ``[nodes, 2 * nodes]``: what tokens reaching a node cost its port in, and the other nodes' ports out.
    ``ranks`` is ``[ranks]``: what they cost the rank's port in.
    """

    nodes: Array
    ranks: Array
    #: 1 / bandwidth, ``[nodes, nodes]`` between nodes and ``[ranks]`` into a rank from its node's others.
    node_cost: Array
    rank_cost: Array
    member: Array

    @classmethod
    def of(cls, cluster: Cluster) -> Ports:
        """The ports of a cluster."""
        part = cluster.node_sizes / cluster.num_ranks
        cost = 1.0 / cluster.node_bandwidth
        into = np.diag(part @ cost)
        out = (part[:, None] * cost).T
        rank_cost = 1.0 / cluster.rank_bandwidth
        return cls(
            np.concatenate([into, out], axis=1),
            rank_cost * (1.0 - 1.0 / cluster.num_ranks),
            cost,
            rank_cost,
            cluster.membership,
        )

    def busiest(self, nodes: Array, ranks: Array) -> Array:
        """Seconds per byte at the busiest port, of tokens that reach ``[..., nodes]`` and ``[..., ranks]``."""
        busiest: Array = np.maximum((nodes @ self.nodes).max(-1), (ranks * self.ranks).max(-1))
        return busiest

    def busiest_of(self, node_copies: Array, rank_copies: Array) -> float:
        """The same from exact copies ``[nodes, nodes]`` between nodes and ``[ranks]`` into ranks."""
        between = node_copies * self.node_cost
        inside = rank_copies * self.rank_cost
        return float(max(between.sum(0).max(), between.sum(1).max(), inside.max()))
