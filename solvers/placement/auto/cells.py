"""Where items may lie when router groups are kept whole, how many copies each expert then has, and pinned experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regraft.solvers.placement.auto import grouping
from regraft.solvers.placement.auto.items import Array, Ints, Items, items_of
from regraft.solvers.placement.auto.replicas import replica_counts, scenario_load
from regraft.solvers.placement.baselines.eplb import pack
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.objective import Objective


@dataclass(frozen=True)
class Cells:
    """Cells are sets of ranks: ``cell`` ``[experts]`` and ``cell_of_rank`` ``[ranks]`` say who belongs where."""

    count: Ints
    cell: Ints
    cell_of_rank: Ints

    def cell_of_item(self, items: Items) -> Ints:
        """``[items]``."""
        return self.cell[items.expert]


def cells_of(objective: Objective, at: int, size: int, groups: str) -> Cells:
    """The cells of one layer for a group mode. Raises ``PlacementError`` where groups cannot be kept so."""
    model, cluster = objective.model, objective.cluster
    load = scenario_load(objective, at)
    if groups == "free" or model.num_groups == 1:
        count = replica_counts(load, size * cluster.num_ranks, cluster.num_ranks)
        everywhere = np.zeros(model.num_experts, dtype=np.int64)
        return Cells(count, everywhere, np.zeros(cluster.num_ranks, dtype=np.int64))
    if groups == "node":
        return _by_node(objective, at, size)
    return _by_block(objective, at, size)


def _by_node(objective: Objective, at: int, size: int) -> Cells:
    """Groups chosen together on one node; each node replicates its own experts."""
    model, cluster = objective.model, objective.cluster
    check_groups_on_nodes(objective)
    load = scenario_load(objective, at)
    width = model.num_experts // model.num_groups
    group_of = np.arange(model.num_experts) // width
    node_of_group = _groups_to_nodes(objective, at, load.reshape(model.num_groups, width).sum(1))
    node = node_of_group[group_of]
    count = np.ones(model.num_experts, dtype=np.int64)
    for number, ranks in enumerate(cluster.node_sizes.tolist()):
        own = np.flatnonzero(node == number)
        count[own] = replica_counts(load[own], size * ranks, ranks)
    return Cells(count, node, cluster.node_of_rank)


def check_groups_on_nodes(objective: Objective) -> None:
    """Raise ``PlacementError`` where whole router groups cannot be dealt evenly to nodes."""
    groups, cluster = objective.model.num_groups, objective.cluster
    if groups % cluster.num_nodes or len(set(cluster.node_sizes.tolist())) > 1:
        raise PlacementError(
            f"{groups} router groups were to be kept whole on {cluster.num_nodes} nodes of "
            f"{', '.join(map(str, cluster.node_sizes))} GPUs; expected equal nodes, as many as divide the groups; "
            "use another number of nodes or let groups be free"
        )


def _groups_to_nodes(objective: Objective, at: int, load: Array) -> Ints:
    model, nodes = objective.model, objective.cluster.num_nodes
    items = items_of(objective, at, np.ones(model.num_experts, dtype=np.int64))
    if nodes == 1 or any(tokens is None for tokens in items.tokens):
        return pack(load, nodes)[0]
    width = model.num_experts // model.num_groups
    together = grouping.coactivation(items)
    blocks = together.reshape(model.num_groups, width, model.num_groups, width).sum((1, 3))
    np.fill_diagonal(blocks, 0.0)
    return grouping.clusters(blocks, np.full(nodes, model.num_groups // nodes), 0)


def _by_block(objective: Objective, at: int, size: int) -> Cells:
    """Each group in a block of slots of its own: an exact permutation of a group-limited model, no copies."""
    model, cluster = objective.model, objective.cluster
    width = model.num_experts // model.num_groups
    if size * cluster.num_ranks != model.num_experts or (width % size and size % width):
        raise PlacementError(
            f"router groups of {width} experts were to be kept in blocks on {cluster.num_ranks} ranks of {size} slots; "
            "expected no redundant slots, and groups that divide or fill whole ranks"
        )
    load = scenario_load(objective, at).reshape(model.num_groups, width).sum(1)
    if size >= width:
        unit, units = np.arange(cluster.num_ranks), cluster.num_ranks
    else:
        unit, units = np.arange(cluster.num_ranks) // (width // size), model.num_groups
    cell = np.repeat(pack(load, units)[0], width)
    return Cells(np.ones(model.num_experts, dtype=np.int64), cell, unit)


def pin(rank: Ints, expert: Ints, pinned: dict[int, int]) -> Ints:
    """Ranks of items with each pinned expert on its rank, by swaps. Raises ``PlacementError`` where pins collide."""
    rank = rank.copy()
    settled = np.zeros(len(rank), dtype=bool)
    for name, target in pinned.items():
        copies = np.flatnonzero(expert == name)
        there = copies[rank[copies] == target]
        if not there.size:
            room = [i for i in np.flatnonzero((rank == target) & ~settled) if int(expert[i]) not in pinned]
            if not room:
                room = [i for i in np.flatnonzero((rank == target) & ~settled) if pinned[int(expert[i])] != target]
            here = int(rank[copies[0]])
            free = [i for i in room if not ((expert == expert[i]) & (rank == here)).any()] or room
            if not free:
                raise PlacementError(
                    f"rank {target} has no slot left for pinned expert {name}; pin fewer experts to it"
                )
            rank[free[0]], rank[copies[0]] = here, target
            there = copies[:1]
        settled[there[0]] = True
    return rank
