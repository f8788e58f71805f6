"""Placements that look at no trace: contiguous blocks, round robin, and random ones."""

from __future__ import annotations

import numpy as np

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.repair import without_duplicates
from regraft.solvers.placement.slots import SlotCounts


def contiguous(model: MoeModel, cluster: Cluster, slots: SlotCounts) -> Plan:
    """Slot ``p`` holds expert ``p mod experts``: what every engine does without a plan."""
    return _plan(model, [_blocks(model.num_experts, cluster.num_ranks, int(size)) for size in slots], "contiguous")


def round_robin(model: MoeModel, cluster: Cluster, slots: SlotCounts) -> Plan:
    """Experts dealt to the ranks in turn; redundant slots go on dealing, one rank further each time round."""
    ranks, experts = cluster.num_ranks, model.num_experts
    tables = []
    for size in slots:
        place = np.arange(int(size))[None, :] * ranks + np.arange(ranks)[:, None]
        tables.append(without_duplicates((place + place // experts) % experts, experts))
    return _plan(model, tables, "round-robin")


def random_plan(model: MoeModel, cluster: Cluster, slots: SlotCounts, seed: int = 0) -> Plan:
    """Experts shuffled, each layer by itself; which experts get the redundant slots is drawn too."""
    generator = np.random.default_rng(seed)
    tables = []
    for size in slots:
        total = cluster.num_ranks * int(size)
        extra = generator.permutation(np.arange(total - model.num_experts) % model.num_experts)
        names = generator.permutation(model.num_experts)
        items = np.concatenate([np.arange(model.num_experts), names[extra]])
        table = generator.permutation(items).reshape(cluster.num_ranks, int(size))
        tables.append(without_duplicates(table, model.num_experts))
    return _plan(model, tables, "random")


def _blocks(experts: int, ranks: int, size: int) -> Slots:
    return (np.arange(ranks * size) % experts).reshape(ranks, size)


def _plan(model: MoeModel, tables: list[Slots], method: str) -> Plan:
    return Plan(model.num_experts, model.layer_ids, model.num_hidden_layers, tuple(tables), model.name, method)
