"""MoETuner's two integer programs as printed (arXiv 2502.06643, sections 5.1 and 5.2), through pulp.

The first clusters each layer's experts by load, the second maps clusters to ranks by the traffic between consecutive
layers. The second has ``ranks^4 * (layers - 1)`` products of variables: it fits small cases only, and is refused else.
"""

from __future__ import annotations

import numpy as np
import pulp
from numpy.typing import NDArray

from regraft.solvers.placement.auto.packing import pack_items
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.ilp import solve
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.slots import SlotCounts

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
#: The tolerance that the paper's solver ran to.
GAP = 0.025
MOST_PRODUCTS = 40_000


def moetuner(
    objective: Objective,
    slots: SlotCounts,
    equal: bool = True,
    seconds_per_layer: float = 5.0,
    seconds_to_map: float = 30.0,
) -> Plan:
    """Both programs in sequence. ``equal`` adds what every engine's map needs, equally many experts in each cluster;
    without it clusters are as printed, of any size, and ranks with fewer experts have empty slots.

    Raises ``PlacementError`` where slots are redundant (there is no replication), where the trace has no transitions,
    and where the second program does not fit.
    """
    model, cluster = objective.model, objective.cluster
    ranks = cluster.num_ranks
    if (slots * ranks != model.num_experts).any():
        raise PlacementError("MoETuner places every expert once; expected no redundant slots, and ranks that divide")
    if not fits(ranks, model.num_layers):
        products = ranks**4 * (model.num_layers - 1)
        raise PlacementError(
            f"MoETuner's second program has {products} products of variables for {ranks} ranks and {model.num_layers} "
            f"layers; at most {MOST_PRODUCTS} are tried: use fewer ranks, or the method auto"
        )
    transitions = [scenario.transitions for scenario in objective.workload.scenarios]
    if any(moves is None for moves in transitions):
        raise PlacementError("MoETuner needs transitions between layers; record choices per token")
    counts = objective.workload.mean_counts
    clusters = [cluster_experts(load, ranks, equal, seconds_per_layer) for load in counts]
    moves = np.sum([w * t for w, t in zip(objective.weights, transitions, strict=True) if t is not None], axis=0)
    places = map_clusters(clusters, moves, cluster, seconds_to_map)
    tables = tuple(_table(place[own], ranks) for own, place in zip(clusters, places, strict=True))
    return Plan(model.num_experts, model.layer_ids, model.num_hidden_layers, tables, model.name, "moetuner")


def fits(ranks: int, layers: int) -> bool:
    """Whether the second program is small enough to be tried."""
    return ranks**4 * (layers - 1) <= MOST_PRODUCTS


def cluster_experts(load: Array, clusters: int, equal: bool = False, seconds: float = 5.0) -> Ints:
    """The first program for one layer: the cluster of each expert, with the least sum of deviations from the mean load.

    No cluster is empty. Warm-started from longest processing time first, which is also kept where nothing is better
    within ``seconds``.
    """
    experts = len(load)
    size = experts // clusters
    start = pack_items(
        load, np.arange(experts), np.zeros(experts, np.int64), np.zeros(clusters, np.int64), np.ones(clusters), size
    )
    unit = load / max(float(load.mean()), 1e-12)
    mean = float(unit.sum()) / clusters
    program = pulp.LpProblem("clusters", pulp.LpMinimize)
    inside = {(c, e): pulp.LpVariable(f"x_{c}_{e}", cat=pulp.LpBinary) for c in range(clusters) for e in range(experts)}
    deviation = [pulp.LpVariable(f"d_{c}", lowBound=0.0) for c in range(clusters)]
    program += pulp.lpSum(deviation)
    for e in range(experts):
        program += pulp.lpSum(inside[c, e] for c in range(clusters)) == 1
    for c in range(clusters):
        total = pulp.lpSum(float(unit[e]) * inside[c, e] for e in range(experts))
        program += total - mean <= deviation[c]
        program += mean - total <= deviation[c]
        members = pulp.lpSum(inside[c, e] for e in range(experts))
        program += members == size if equal else members >= 1
    warm = {f"x_{c}_{e}": float(start[e] == c) for c, e in inside}
    totals = np.bincount(start, unit, minlength=clusters)
    warm.update({f"d_{c}": abs(float(totals[c]) - mean) for c in range(clusters)})
    if solve(program, seconds, GAP, start=warm).status == "none":
        return start
    chosen = np.array([[inside[c, e].varValue or 0.0 for c in range(clusters)] for e in range(experts)])
    return np.asarray(chosen.argmax(1), dtype=np.int64)


def map_clusters(clusters: list[Ints], moves: Array, cluster: Cluster, seconds: float = 30.0) -> list[Ints]:
    """The second program: the rank of each cluster in each layer, ``[ranks]`` a layer.

    ``moves`` ``[layers - 1, experts, experts]`` are copies between experts. Minimises the sum over layers of the
    largest traffic over bandwidth of a pair of ranks; every rank holds equally many experts over all layers. Where no
    such mapping is found within ``seconds``, clusters keep their numbers.
    """
    ranks, layers = cluster.num_ranks, len(clusters)
    flows = [_flow(clusters[at], clusters[at + 1], moves[at], ranks) for at in range(layers - 1)]
    program = pulp.LpProblem("ranks", pulp.LpMinimize)
    every = range(ranks)
    on = {
        (c, g, at): pulp.LpVariable(f"y_{c}_{g}_{at}", cat=pulp.LpBinary)
        for at in range(layers)
        for c in every
        for g in every
    }
    slowest = [pulp.LpVariable(f"m_{at}", lowBound=0.0) for at in range(layers - 1)]
    program += pulp.lpSum(slowest)
    for at in range(layers):
        for one in every:
            program += pulp.lpSum(on[one, g, at] for g in every) == 1
            program += pulp.lpSum(on[c, one, at] for c in every) == 1
    _equal_memory(program, on, clusters, ranks)
    scale = max(float(max((flow.max() for flow in flows), default=1.0)), 1e-12)
    for at, flow in enumerate(flows):
        _pair_costs(program, on, slowest[at], flow / scale, at, cluster)
    start = {f"y_{c}_{g}_{at}": float(c == g) for c, g, at in on}
    if solve(program, seconds, GAP, start=_complete(start, flows, scale, cluster)).status == "none":
        return [np.arange(ranks) for _ in range(layers)]
    return [np.array([[on[c, g, at].varValue or 0.0 for g in every] for c in every]).argmax(1) for at in range(layers)]


def _pair_costs(
    program: pulp.LpProblem,
    on: dict[tuple[int, int, int], pulp.LpVariable],
    slowest: pulp.LpVariable,
    flow: Array,
    at: int,
    cluster: Cluster,
) -> None:
    """The largest pair's cost; each product of two binaries is a variable not below their sum less one."""
    every = range(cluster.num_ranks)
    fastest = float(cluster.bandwidth.max())
    for first in every:
        for second in every:
            if first == second:
                continue
            terms = []
            for one in every:
                for two in every:
                    if flow[one, two] > 0:
                        both = pulp.LpVariable(f"w_{at}_{first}_{second}_{one}_{two}", lowBound=0.0)
                        program += both >= on[one, first, at] + on[two, second, at + 1] - 1
                        terms.append(float(flow[one, two]) * both)
            program += (fastest / float(cluster.bandwidth[first, second])) * pulp.lpSum(terms) <= slowest


def _equal_memory(
    program: pulp.LpProblem, on: dict[tuple[int, int, int], pulp.LpVariable], clusters: list[Ints], ranks: int
) -> None:
    sizes = np.stack([np.bincount(own, minlength=ranks) for own in clusters])
    if (sizes == sizes[0, 0]).all():
        return
    each = int(sizes.sum()) / ranks
    for g in range(ranks):
        held = pulp.lpSum(int(sizes[at, c]) * on[c, g, at] for at in range(len(clusters)) for c in range(ranks))
        program += held == each


def _complete(start: dict[str, float], flows: list[Array], scale: float, cluster: Cluster) -> dict[str, float]:
    """The products and largest costs that belong to every cluster keeping its number."""
    fastest = float(cluster.bandwidth.max())
    whole = dict(start)
    for at, flow in enumerate(flows):
        largest = 0.0
        for first in range(cluster.num_ranks):
            for second in range(cluster.num_ranks):
                if first != second and flow[first, second] > 0:
                    whole[f"w_{at}_{first}_{second}_{first}_{second}"] = 1.0
                    cost = fastest / float(cluster.bandwidth[first, second]) * float(flow[first, second]) / scale
                    largest = max(largest, cost)
        whole[f"m_{at}"] = largest
    return whole


def _flow(first: Ints, second: Ints, moves: Array, ranks: int) -> Array:
    flow: Array = np.eye(ranks)[first].T @ moves @ np.eye(ranks)[second]
    return flow


def _table(rank: Ints, ranks: int) -> Slots:
    """Experts of each rank, ascending, with empty slots at the end where a rank has fewer."""
    size = int(np.bincount(rank, minlength=ranks).max())
    table = np.full((ranks, size), -1, dtype=np.int64)
    for number in range(ranks):
        own = np.flatnonzero(rank == number)
        table[number, : len(own)] = own
    return table
