"""How many token copies cross between ranks and nodes in one layer.

``dispatch``: a token is sent once to each distinct rank that serves it, and crosses once to each distinct node, where
it is passed on (DeepEP's normal mode). ``per-expert``: one message for each token and chosen expert (its low-latency
mode). A copy that stays on its source rank is no traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.split import chosen_ranks


@dataclass(frozen=True)
class Traffic:
    """Copies sent in one layer: ``ranks`` ``[source, destination]`` by rank, ``nodes`` by node; zero diagonals.

    ``destinations`` is the number of distinct ranks that served a token, summed over the ``tokens``.
    """

    ranks: NDArray[np.int64]
    nodes: NDArray[np.int64]
    tokens: int
    destinations: int

    @property
    def crossing(self) -> int:
        """Copies that left their rank."""
        return int(self.ranks.sum())

    @property
    def cross_node(self) -> int:
        """Copies that left their node."""
        return int(self.nodes.sum())


def count_traffic(
    table: Slots,
    experts: NDArray[np.integer],
    num_experts: int,
    cluster: Cluster,
    sources: NDArray[np.integer] | None = None,
    split: str = "even",
    communication: str = "dispatch",
    tokens: NDArray[np.integer] | None = None,
) -> Traffic:
    """Exact copies of these tokens, whose choices are ``[tokens, top_k]``, under a layer's table ``[ranks, slots]``.

    Without ``sources`` tokens are dealt to ranks in turn. ``tokens`` are their numbers, which "even" hashes: their
    places in ``experts``, or, as a sharded model numbers them, in their own rank's call.
    """
    places = np.arange(len(experts))
    source = places % cluster.num_ranks if sources is None else np.asarray(sources, dtype=np.int64)
    numbers = places if tokens is None else np.asarray(tokens, dtype=np.int64)
    served = chosen_ranks(table, experts, numbers, source, cluster, split, num_experts)
    distinct = touched(served, cluster.num_ranks)
    destinations = int(distinct.sum())
    if communication == "per-expert":
        ranks = _messages(source, served, cluster.num_ranks)
        nodes = _node_sums(ranks, cluster)
    else:
        ranks = _sums_by(source, distinct, cluster.num_ranks)
        reached = touched(np.where(served >= 0, cluster.node_of_rank[served], -1), cluster.num_nodes)
        nodes = _sums_by(cluster.node_of_rank[source], reached, cluster.num_nodes)
    np.fill_diagonal(ranks, 0)
    np.fill_diagonal(nodes, 0)
    return Traffic(ranks, nodes, len(experts), destinations)


def plan_traffic(
    plan: Plan,
    experts: NDArray[np.integer],
    cluster: Cluster,
    sources: NDArray[np.integer] | None = None,
    split: str = "even",
    communication: str = "dispatch",
    tokens: NDArray[np.integer] | None = None,
) -> list[Traffic]:
    """``count_traffic`` for every layer of a plan; choices are ``[layers, tokens, top_k]``."""
    return [
        count_traffic(table, experts[at], plan.num_experts, cluster, sources, split, communication, tokens)
        for at, table in enumerate(plan.slots)
    ]


def touched(places: NDArray[np.integer], num_places: int) -> NDArray[np.bool_]:
    """``[tokens, places]``: whether any of a token's choices ``[tokens, top_k]`` (-1: none) lies at the place."""
    found = np.zeros((len(places), num_places + 1), dtype=bool)
    found[np.arange(len(places))[:, None], places] = True
    return found[:, :num_places]


def _sums_by(group: NDArray[np.integer], rows: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    token, place = np.nonzero(rows)
    return np.bincount(group[token] * size + place, minlength=size * size).reshape(size, size)


def _messages(source: NDArray[np.integer], served: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    pair = np.where(served >= 0, source[:, None] * size + served, size * size)
    return np.bincount(pair.ravel(), minlength=size * size + 1)[:-1].reshape(size, size)


def _node_sums(ranks: NDArray[np.int64], cluster: Cluster) -> NDArray[np.int64]:
    member = cluster.membership.astype(np.int64)
    return member.T @ ranks @ member
