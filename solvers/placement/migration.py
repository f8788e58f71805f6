"""What it costs to bring a new plan into service: bytes moved, seconds, and batches until it has paid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.constraints import moves
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan, Slots


@dataclass(frozen=True)
class Migration:
    """From a plan in service to another. ``seconds`` is the slowest rank's time to receive what it lacks."""

    experts: int
    bytes: float
    cross_node_bytes: float
    seconds: float
    #: Batches after which the seconds saved exceed those spent; infinite where nothing is saved.
    payback_batches: float


def migration(
    current: Plan, plan: Plan, model: MoeModel, cluster: Cluster, saved_per_batch: float | None = None
) -> Migration:
    """What moves from ``current`` to ``plan``; a missing expert comes from its nearest holder."""
    count = moves(current, plan)
    cross = 0
    arriving = np.zeros(cluster.num_ranks)
    for at in range(plan.num_layers):
        old, new = current.presence(at), plan.presence(at) & ~current.presence(at)
        for rank, expert in np.argwhere(new):
            holders = np.flatnonzero(old[:, expert])
            near = holders[cluster.node_of_rank[holders] == cluster.node_of_rank[rank]]
            source = near if near.size else holders
            cross += int(not near.size)
            arriving[rank] += model.expert_bytes / cluster.bandwidth[source, rank].max()
    seconds = float(arriving.max(initial=0.0))
    payback = seconds / saved_per_batch if saved_per_batch and saved_per_batch > 0 else math.inf
    return Migration(
        count,
        count * model.expert_bytes,
        cross * model.expert_bytes,
        seconds,
        0.0 if count == 0 else payback,
    )


def keep_slots(current: Plan, plan: Plan) -> Plan:
    """The same plan with every expert that stays on a rank in the slot it has there: nothing moves inside a rank."""
    if current.slots_per_rank != plan.slots_per_rank or current.num_ranks != plan.num_ranks:
        return plan
    tables = tuple(_kept(old, new) for old, new in zip(current.slots, plan.slots, strict=True))
    return Plan(plan.num_experts, plan.layer_ids, plan.num_hidden_layers, tables, plan.model_name, plan.method)


def _kept(old: Slots, new: Slots) -> Slots:
    table = np.full_like(new, -1)
    for rank in range(len(new)):
        row = table[rank]
        stays = np.isin(old[rank], new[rank]) & (old[rank] >= 0)
        row[stays] = old[rank][stays]
        row[~stays] = _others(new[rank], row[stays])
    return table


def _others(held: NDArray[np.int64], placed: NDArray[np.int64]) -> NDArray[np.int64]:
    return held[~np.isin(held, placed)]
