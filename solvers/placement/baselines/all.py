"""Every baseline by name."""

from __future__ import annotations

from regraft.solvers.placement.baselines.eplb import eplb
from regraft.solvers.placement.baselines.moetuner import moetuner
from regraft.solvers.placement.baselines.simple import contiguous, random_plan, round_robin
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.slots import SlotCounts

#: The quick ones, which ``auto`` starts from; MoETuner's integer programs are asked for by name.
NAMES = ("contiguous", "round-robin", "eplb", "eplb-hierarchical")


def baseline(name: str, objective: Objective, slots: SlotCounts, seed: int = 0) -> Plan:
    """The plan of a baseline on the objective's trace, as its authors make it.

    Raises ``PlacementError`` for an unknown name, and where the baseline does not fit the cluster.
    """
    model, cluster = objective.model, objective.cluster
    if name == "contiguous":
        return contiguous(model, cluster, slots)
    if name == "round-robin":
        return round_robin(model, cluster, slots)
    if name == "random":
        return random_plan(model, cluster, slots, seed)
    if name in ("eplb", "eplb-global"):
        return eplb(model, cluster, slots, objective.workload.mean_counts, hierarchical=False)
    if name == "eplb-hierarchical":
        return eplb(model, cluster, slots, objective.workload.mean_counts, hierarchical=True)
    if name == "moetuner":
        return moetuner(objective, slots)
    raise PlacementError(f"baseline {name!r} was named; expected one of {', '.join((*NAMES, 'random', 'moetuner'))}")


def quick_baselines(objective: Objective, slots: SlotCounts) -> dict[str, Plan]:
    """All quick baselines that fit the cluster; the hierarchical form only where it differs from the global one."""
    model, cluster = objective.model, objective.cluster
    found = {name: baseline(name, objective, slots) for name in NAMES[:3]}
    equal = len(set(cluster.node_sizes.tolist())) == 1
    if cluster.num_nodes > 1 and equal and model.num_groups % cluster.num_nodes == 0:
        found["eplb-hierarchical"] = baseline("eplb-hierarchical", objective, slots)
    return found
