"""Every figure that a plan is compared by, on a workload of its own (held-out batches, another domain)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.migration import Migration, migration
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScenarioMetrics:
    """One scenario. Copies are per token and layer, ports in bytes per batch, times in seconds.

    ``balancedness`` is the mean over batches and layers of mean rank load / largest rank load; ``balancedness_summed``
    divides the sums over batches and layers; ``imbalance`` is the mean of (largest - mean) / mean.
    ``cross_node_copies`` and ``destination_ranks`` count what the scenario's communication model sends.
    """

    name: str
    communication: str
    seconds: float
    slowdown: float
    balancedness: float
    balancedness_summed: float
    imbalance: float
    cross_node_copies: float
    destination_ranks: float
    max_ingress: float
    max_egress: float
    layer_p50: float
    layer_p95: float
    layer_p99: float
    batch_p99: float
    #: Whether tokens' choices were recorded; if not, copies assume that experts are chosen independently.
    copies_exact: bool


@dataclass(frozen=True)
class Metrics:
    """A plan's figures: over all scenarios (means weighted as the objective weighs them) and for each."""

    objective: float
    balancedness: float
    worst_balancedness: float
    cross_node_copies: float
    destination_ranks: float
    layer_p50: float
    layer_p95: float
    layer_p99: float
    slots_per_rank: int
    memory_per_rank: float
    scenarios: tuple[ScenarioMetrics, ...]
    migration: Migration | None = None
    #: Tokens per rank and layer of a mean batch, ``[scenarios, layers, ranks]``, and copies per token between nodes
    #: summed over layers, ``[nodes, nodes]``; for plots.
    load: Array = field(default_factory=lambda: np.zeros((0, 0, 0)), repr=False)
    traffic: Array = field(default_factory=lambda: np.zeros((0, 0)), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain numbers, without the arrays."""
        plain = asdict(self)
        del plain["load"], plain["traffic"]
        return plain


@dataclass(frozen=True)
class _Copies:
    cross_node: float
    destinations: float
    ingress: float
    egress: float
    nodes: Array


def evaluate(plan: Plan, objective: Objective, current: Plan | None = None) -> Metrics:
    """All figures of ``plan`` on the objective's workload. With ``current``, what it takes to get there from it.

    Raises ``PlacementError`` for a plan of another model or cluster.
    """
    seconds = objective.seconds(plan)
    rows, loads, traffic = [], [], np.zeros((objective.cluster.num_nodes,) * 2)
    for number, own in enumerate(seconds):
        tokens = np.stack([objective.loads(number, at, table).tokens for at, table in enumerate(plan.slots)], axis=1)
        copies = [_layer_copies(plan, objective, number, at) for at in range(plan.num_layers)]
        rows.append(_scenario(objective, number, own, tokens, copies))
        loads.append(tokens.mean(0))
        traffic += objective.weights[number] * np.sum([layer.nodes for layer in copies], axis=0)
    value = float(objective.joined(np.array([own.mean(0).sum() for own in seconds])))
    memory = float(max(sum((table >= 0).sum(1) for table in plan.slots)) * objective.model.expert_bytes)
    weights = objective.weights
    return Metrics(
        value,
        float(weights @ [row.balancedness for row in rows]),
        min(row.balancedness for row in rows),
        float(weights @ [row.cross_node_copies for row in rows]),
        float(weights @ [row.destination_ranks for row in rows]),
        float(weights @ [row.layer_p50 for row in rows]),
        float(weights @ [row.layer_p95 for row in rows]),
        float(weights @ [row.layer_p99 for row in rows]),
        max(plan.slots_per_rank),
        memory,
        tuple(rows),
        None if current is None else _migration(current, plan, objective, seconds),
        np.stack(loads),
        traffic,
    )


def balancedness(tokens: Array) -> Array:
    """Mean rank load over largest rank load, ``[...]``, from loads ``[..., ranks]``; 1 where there is no load."""
    largest = tokens.max(-1)
    return np.where(largest > 0, tokens.mean(-1) / np.where(largest > 0, largest, 1.0), 1.0)


def plan_balancedness(plan: Plan, objective: Objective) -> Array:
    """Balancedness of every layer, mean over batches, ``[scenarios, layers]``."""
    return np.array(
        [
            [balancedness(objective.loads(number, at, table).tokens).mean() for at, table in enumerate(plan.slots)]
            for number in range(len(objective.workload.scenarios))
        ]
    )


def _scenario(
    objective: Objective, number: int, seconds: Array, tokens: Array, copies: list[_Copies]
) -> ScenarioMetrics:
    scenario = objective.workload.scenarios[number]
    mean, largest = tokens.mean(-1), tokens.max(-1)
    loaded = largest > 0
    size = objective.model.dispatch_bytes * float(scenario.tokens.mean())
    p50, p95, p99 = (float(value) for value in np.percentile(seconds, (50, 95, 99)))
    total = float(seconds.mean(0).sum())
    return ScenarioMetrics(
        scenario.name,
        objective.communication[number],
        total,
        total / float(objective.ideal[number]),
        float(balancedness(tokens).mean()),
        float(mean.sum() / largest.sum()),
        float(((largest - mean)[loaded] / mean[loaded]).mean()),
        float(np.mean([layer.cross_node for layer in copies])),
        float(np.mean([layer.destinations for layer in copies])),
        max(layer.ingress for layer in copies) * size,
        max(layer.egress for layer in copies) * size,
        p50,
        p95,
        p99,
        float(np.percentile(seconds.sum(1), 99)),
        scenario.experts is not None or objective.communication[number] != "dispatch",
    )


def _layer_copies(plan: Plan, objective: Objective, number: int, at: int) -> _Copies:
    """Copies per token of one layer under the scenario's communication model, and its busiest rank or node port."""
    kind, table, cluster = objective.communication[number], plan.slots[at], objective.cluster
    part = cluster.node_sizes / cluster.num_ranks
    scenario = objective.workload.scenarios[number]
    if kind == "resident":
        if at == 0:
            return _Copies(0.0, 0.0, 0.0, 0.0, np.zeros((cluster.num_nodes,) * 2))
        hops = objective.hops(number, at, plan.slots[at - 1], table)
        np.fill_diagonal(hops, 0.0)
        nodes = cluster.membership.T @ hops @ cluster.membership
        np.fill_diagonal(nodes, 0.0)
        return _Copies(nodes.sum(), hops.sum(), hops.sum(0).max(), hops.sum(1).max(), nodes)
    if kind == "per-expert":
        ranks = objective.loads(number, at, table).tokens.sum(0) / max(float(scenario.tokens[:, at].sum()), 1e-9)
        reach = ranks @ cluster.membership
    elif scenario.experts is not None and (objective.split == "nearest" or scenario.sources is not None):
        nodes, ranks = objective.exact_copies(number, at, table)
        _, reached = objective.node_reach(number, at, table)
        return _Copies(nodes.sum(), reached.sum(), ranks.max(), nodes.sum(1).max(), nodes)
    else:
        reach, ranks = objective.node_reach(number, at, table)
    nodes = part[:, None] * reach[None, :]
    np.fill_diagonal(nodes, 0.0)
    into = ranks * (1.0 - 1.0 / cluster.num_ranks)
    out = (ranks.sum() - ranks) / cluster.num_ranks
    return _Copies(float(nodes.sum()), float(ranks.sum()), float(into.max()), float(out.max()), nodes)


def _migration(current: Plan, plan: Plan, objective: Objective, seconds: list[Array]) -> Migration:
    before = objective.seconds(current)
    saved = [float((old.mean(0) - new.mean(0)).sum()) for old, new in zip(before, seconds, strict=True)]
    return migration(current, plan, objective.model, objective.cluster, float(objective.weights @ saved))
