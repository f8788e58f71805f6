"""DeepSeek's expert-parallel load balancer, after its published description (github.com/deepseek-ai/EPLB).

Hierarchical, where the nodes divide the router groups: groups are packed to nodes, experts replicated inside each
node, copies packed to its ranks. Global otherwise: the same with one group and one node. It may put two copies of an
expert on one rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.slots import SlotCounts

Loads = NDArray[np.float64]


def eplb(model: MoeModel, cluster: Cluster, slots: SlotCounts, counts: Loads, hierarchical: bool | None = None) -> Plan:
    """The balancer's plan for mean tokens per expert ``[layers, experts]``.

    ``hierarchical`` None chooses as the balancer does. Raises ``PlacementError`` where the hierarchical form is asked
    for and nodes are unequal or do not divide the groups.
    """
    nodes = cluster.num_nodes
    fits = model.num_groups % nodes == 0 and len(set(cluster.node_sizes.tolist())) == 1
    if hierarchical and not fits:
        raise PlacementError(
            f"hierarchical balancing was asked for {model.num_groups} router groups on {nodes} nodes; "
            "expected equal nodes, as many as divide the groups; use the global form"
        )
    grouped = fits if hierarchical is None else hierarchical
    groups, places = (model.num_groups, nodes) if grouped else (1, 1)
    tables = [
        balance_layer(load, int(size) * cluster.num_ranks, groups, places, cluster.num_ranks)
        for load, size in zip(counts, slots, strict=True)
    ]
    method = "eplb-hierarchical" if grouped and places > 1 else "eplb"
    return Plan(model.num_experts, model.layer_ids, model.num_hidden_layers, tuple(tables), model.name, method)


def balance_layer(load: Loads, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> Slots:
    """One layer: the expert of each slot, ``[ranks, slots per rank]``, for loads ``[experts]``."""
    size = len(load) // num_groups
    node_of_group, _ = pack(load.reshape(num_groups, size).sum(1), num_nodes)
    ranks_per_node, slots_per_node = num_ranks // num_nodes, num_slots // num_nodes
    tables = []
    for node in range(num_nodes):
        groups = _in_packing_order(load.reshape(num_groups, size).sum(1), node_of_group, node)
        experts = (groups[:, None] * size + np.arange(size)).reshape(-1)
        copies, count = replicate(load[experts], slots_per_node)
        weight = (load[experts] / count)[copies]
        rank, place = pack(weight, ranks_per_node)
        table = np.empty((ranks_per_node, slots_per_node // ranks_per_node), dtype=np.int64)
        table[rank, place] = experts[copies]
        tables.append(table)
    return np.concatenate(tables)


def pack(weight: Loads, num_packs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Equal numbers of items in each pack: heaviest first, each to the lightest pack that is not full.

    Returns the pack of each item and its place in the pack.
    """
    items = len(weight)
    capacity = items // num_packs
    if capacity == 1:
        return np.arange(items), np.zeros(items, dtype=np.int64)
    pack_of, place = np.zeros(items, dtype=np.int64), np.zeros(items, dtype=np.int64)
    total, filled = [0.0] * num_packs, [0] * num_packs
    open_packs = list(range(num_packs))
    for item in np.argsort(-weight, kind="stable"):
        chosen = min(open_packs, key=total.__getitem__)
        pack_of[item], place[item] = chosen, filled[chosen]
        total[chosen] += float(weight[item])
        filled[chosen] += 1
        if filled[chosen] == capacity:
            open_packs.remove(chosen)
    return pack_of, place


def replicate(weight: Loads, num_slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One more copy for the expert with the largest load per copy, until all slots are used.

    Returns the expert of each copy, ``[slots]``, and the copies of each expert.
    """
    count = np.ones(len(weight), dtype=np.int64)
    copies = list(range(len(weight)))
    while len(copies) < num_slots:
        chosen = int((weight / count).argmax())
        copies.append(chosen)
        count[chosen] += 1
    return np.array(copies), count


def _in_packing_order(weight: Loads, node_of_group: NDArray[np.int64], node: int) -> NDArray[np.int64]:
    order = np.argsort(-weight, kind="stable")
    chosen: NDArray[np.int64] = order[node_of_group[order] == node]
    return chosen
