"""What a plan must satisfy, and checks that name each constraint that it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan

#: How router groups are kept: anywhere; each on one node; or each in its own contiguous block of slots, so that the
#: plan is an exact permutation of a group-limited model.
GROUP_MODES = ("free", "node", "block")


@dataclass(frozen=True)
class Constraints:
    """Limits of a plan. ``pinned`` maps (layer id, expert) to the rank that must hold it."""

    groups: str = "free"
    pinned: Mapping[tuple[int, int], int] = field(default_factory=dict)
    #: Bytes of expert weights a rank may hold, over all layers; None: the GPU's whole memory.
    memory: float | None = None
    #: The plan in service, and how many experts may newly come to a rank, over all layers.
    current: Plan | None = None
    max_moves: int | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        if self.groups not in GROUP_MODES:
            raise PlacementError(f"group mode {self.groups!r} was given; expected one of {', '.join(GROUP_MODES)}")
        if self.max_moves is not None and self.current is None:
            raise PlacementError("a bound on moves was given without the current plan; pass the plan in service too")
        if self.max_moves is not None and self.max_moves < 0:
            raise PlacementError(f"a bound of {self.max_moves} moves was given; expected 0 or more")

    def budget(self, cluster: Cluster) -> NDArray[np.float64]:
        """Bytes of expert weights that each rank may hold."""
        return cluster.memory if self.memory is None else np.minimum(cluster.memory, self.memory)

    def pins(self, layer: int) -> dict[int, int]:
        """Expert to rank, of one layer."""
        return {expert: rank for (other, expert), rank in self.pinned.items() if other == layer}


def moves(current: Plan, plan: Plan) -> int:
    """Experts that a rank holds in ``plan`` and does not in ``current``, over all layers: what must be sent."""
    if (current.num_ranks, current.layer_ids, current.num_experts) != (
        plan.num_ranks,
        plan.layer_ids,
        plan.num_experts,
    ):
        raise PlacementError(
            "plans of different models or numbers of ranks cannot be compared: "
            f"{current.num_ranks} ranks, {current.num_layers} layers, {current.num_experts} experts against "
            f"{plan.num_ranks}, {plan.num_layers}, {plan.num_experts}"
        )
    return sum(int((plan.presence(at) & ~current.presence(at)).sum()) for at in range(plan.num_layers))


def violations(plan: Plan, model: MoeModel, cluster: Cluster, constraints: Constraints | None = None) -> list[str]:
    """Every constraint that the plan breaks, a sentence each; empty for a valid plan."""
    constraints = constraints or Constraints()
    found = list(_mismatches(plan, model, cluster))
    if found:
        return found
    for at in range(plan.num_layers):
        found += _layer_violations(plan, at, constraints)
        found += _group_violations(plan, at, model, cluster, constraints.groups)
    found += _memory_violations(plan, model, cluster, constraints)
    found += _pin_violations(plan, constraints)
    if constraints.max_moves is not None and constraints.current is not None:
        made = moves(constraints.current, plan)
        if made > constraints.max_moves:
            found.append(f"the plan moves {made} experts; at most {constraints.max_moves} may move")
    return found


def validate(plan: Plan, model: MoeModel, cluster: Cluster, constraints: Constraints | None = None) -> None:
    """Raise ``PlacementError`` with the first constraints that the plan breaks."""
    found = violations(plan, model, cluster, constraints)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise PlacementError("; ".join(found[:3]) + more)


def check_memory(
    slots_per_rank: NDArray[np.integer], model: MoeModel, cluster: Cluster, constraints: Constraints
) -> None:
    """Raise ``PlacementError`` where these slots (one number a layer) do not fit, saying by how much."""
    needed = float(slots_per_rank.sum()) * model.expert_bytes
    budget = constraints.budget(cluster)
    tightest = int(budget.argmin())
    short = (needed - budget[tightest]) / 1e9
    if short > 0:
        raise PlacementError(
            f"memory: {int(slots_per_rank.sum())} expert slots need {needed / 1e9:.3f} GB per rank, "
            f"rank {tightest} has {budget[tightest] / 1e9:.3f} GB, {short:.3f} GB too little; "
            "use more ranks, fewer redundant slots or narrower weights"
        )


def check_pins(constraints: Constraints, model: MoeModel, cluster: Cluster) -> None:
    """Raise ``PlacementError`` for a pinned expert, layer or rank that does not exist."""
    for (layer, expert), rank in constraints.pinned.items():
        if layer not in model.layer_ids or not 0 <= expert < model.num_experts or not 0 <= rank < cluster.num_ranks:
            raise PlacementError(
                f"expert {expert} of layer {layer} is pinned to rank {rank}; expected an expert layer, "
                f"0 <= expert < {model.num_experts} and 0 <= rank < {cluster.num_ranks}"
            )


def _mismatches(plan: Plan, model: MoeModel, cluster: Cluster) -> Iterator[str]:
    if plan.num_experts != model.num_experts:
        yield f"the plan is for {plan.num_experts} experts, the model has {model.num_experts}"
    if plan.layer_ids != model.layer_ids:
        yield (
            f"the plan is for layers {plan.layer_ids[0]} to {plan.layer_ids[-1]} ({plan.num_layers}), the model's "
            f"expert layers are {model.layer_ids[0]} to {model.layer_ids[-1]} ({model.num_layers})"
        )
    if plan.num_ranks != cluster.num_ranks:
        yield f"the plan is for {plan.num_ranks} ranks, the cluster has {cluster.num_ranks}"


def _layer_violations(plan: Plan, at: int, constraints: Constraints) -> Iterator[str]:
    table, layer = plan.slots[at], plan.layer_ids[at]
    missing = np.flatnonzero(plan.replicas[at] == 0)
    if missing.size:
        yield f"layer {layer} has no copy of expert {missing[0]}"
    if (table < 0).any() and not constraints.allow_empty:
        yield f"layer {layer} has {(table < 0).sum()} empty slots"
    ordered = np.sort(table, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        rank, slot = np.argwhere(twice)[0]
        yield f"layer {layer} holds expert {ordered[rank, slot]} twice on rank {rank}"


def _group_violations(plan: Plan, at: int, model: MoeModel, cluster: Cluster, mode: str) -> Iterator[str]:
    if mode == "free" or model.num_groups == 1:
        return
    table, layer = plan.slots[at], plan.layer_ids[at]
    size = model.num_experts // model.num_groups
    group = np.where(table >= 0, table // size, -1)
    if mode == "node":
        for number in range(model.num_groups):
            nodes = np.unique(cluster.node_of_rank[np.nonzero(group == number)[0]])
            if len(nodes) > 1:
                yield f"layer {layer} spreads router group {number} over nodes {nodes.tolist()}"
                return
        return
    flat = group.reshape(-1)
    blocks = flat.reshape(-1, size) if flat.size == model.num_experts else np.zeros((0, size))
    if len(blocks) == 0 or (blocks != blocks[:, :1]).any():
        yield f"layer {layer} breaks up router groups of {size}: it is no permutation that keeps them whole"


def _memory_violations(plan: Plan, model: MoeModel, cluster: Cluster, constraints: Constraints) -> Iterator[str]:
    held = np.sum([(table >= 0).sum(1) for table in plan.slots], axis=0) * model.expert_bytes
    over = held - constraints.budget(cluster)
    if (over > 0).any():
        rank = int(over.argmax())
        yield f"memory: rank {rank} holds {held[rank] / 1e9:.3f} GB of experts, {over[rank] / 1e9:.3f} GB too much"


def _pin_violations(plan: Plan, constraints: Constraints) -> Iterator[str]:
    for (layer, expert), rank in constraints.pinned.items():
        if layer in plan.layer_ids and expert not in plan.slots[plan.layer_ids.index(layer)][rank]:
            yield f"layer {layer} does not hold expert {expert} on rank {rank}, to which it is pinned"
