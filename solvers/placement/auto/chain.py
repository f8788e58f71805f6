"""The resident model: where a layer's experts lie decides what the next layer's tokens travel.

Experts that share tokens with the same experts of the neighbouring layers are grouped, groups are assigned to ranks
along the chain, and then every layer is searched with its neighbours held, even layers and odd layers in turn.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from regraft.solvers.placement.auto import grouping
from regraft.solvers.placement.auto.cells import cells_of
from regraft.solvers.placement.auto.copies import exchange_copies
from regraft.solvers.placement.auto.independent import BALANCE_WORTH
from regraft.solvers.placement.auto.items import Array, Ints, Items, items_of, table_of
from regraft.solvers.placement.auto.layer import LayerTask, solve_layer
from regraft.solvers.placement.auto.search import Search
from regraft.solvers.placement.chain_assignment import assign_chain
from regraft.solvers.placement.constraints import violations
from regraft.solvers.placement.metrics import plan_balancedness
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.repair import duplicates, without_duplicates
from regraft.solvers.placement.slots import SlotCounts

_SWEEPS = 3


def improve_chain(search: Search) -> Plan:
    """The best plan found, not worse than any of the starts."""
    objective, constraints = search.objective, search.constraints
    found = [search.best]
    if constraints.groups == "free" and not constraints.pinned:
        for by_rank in (True, False):
            if not search.clock.out:
                grouped = _grouped(objective, search.slots, by_rank, search.options.seed)
                if not violations(grouped, objective.model, objective.cluster, constraints):
                    found.append(grouped)
    start = min(found, key=objective.value)
    for sweep in range(_SWEEPS):
        before = objective.value(start)
        start = _sweep(search, start, sweep)
        if search.clock.out or objective.value(start) > before * (1.0 - 1e-3):
            break
    start = exchange_copies(search, start, partial(_local, objective))
    plans = [start, *found, *search.starts.values()]
    return _choose(objective, plans, search.keep, search.limit)


def _choose(objective: Objective, plans: list[Plan], keep: Plan | None, limit: float) -> Plan:
    """The cheapest that is as balanced as ``keep``; the cheapest of all where that costs too much."""
    cheapest = min(plans, key=objective.value)
    if keep is None:
        return cheapest
    least = float(objective.weights @ plan_balancedness(keep, objective).mean(1)) * (1.0 - 1e-9)
    even = [p for p in plans if float(objective.weights @ plan_balancedness(p, objective).mean(1)) >= least]
    if even:
        chosen = min(even, key=objective.value)
        most = min(limit, objective.value(cheapest) * (1.0 + BALANCE_WORTH))
        if objective.value(chosen) <= most * (1.0 + 1e-12):
            return chosen
    return cheapest


def _sweep(search: Search, plan: Plan, number: int) -> Plan:
    """Search every layer once; a table is taken over where the whole plan gets cheaper."""
    objective, layers, done = search.objective, plan.num_layers, 0
    for parity in (0, 1):
        chosen = list(range(parity, layers, 2))
        seconds = search.share((layers - done) * (_SWEEPS - number))
        tables = search.run(solve_layer, [_task(search, plan, at, seconds) for at in chosen])
        for at in chosen:
            if search.clock.out:
                return plan
            trial = _with_table(plan, at, next(tables))
            if _local(objective, trial, at) < _local(objective, plan, at):
                plan = trial
            done += 1
            search.report((number * layers + done) / (_SWEEPS * layers))
    return plan


def _with_table(plan: Plan, at: int, table: Slots) -> Plan:
    return replace(plan, slots=(*plan.slots[:at], table, *plan.slots[at + 1 :]))


def _local(objective: Objective, plan: Plan, at: int) -> float:
    """The joined objective of what layer ``at`` takes part in; of all layers, where scenarios tie these together."""
    if objective.aggregate == "min-max":
        return objective.value(plan)
    numbers = range(len(objective.workload.scenarios))
    total = np.zeros(len(numbers))
    for layer in range(at, min(at + 2, plan.num_layers)):
        before = plan.slots[layer - 1] if layer else None
        total += [np.sum(objective.layer(n, layer, plan.slots[layer], before), axis=0).mean() for n in numbers]
    return float(objective.joined(total))


def _task(search: Search, plan: Plan, at: int, seconds: float | None) -> LayerTask:
    objective, table = search.objective, plan.slots[at]
    offset = np.zeros(len(objective.workload.scenarios))
    if objective.aggregate == "min-max":
        means = objective.layer_means(plan)
        offset = means.sum(1) - means[:, at]
    items = items_of(objective, at, plan.replicas[at])
    return LayerTask(
        search.smooth,
        at,
        int(table.shape[1]),
        (table,),
        search.constraints.groups,
        search.pins(at),
        offset,
        search.options.effort,
        search.options.seed + at,
        seconds,
        pull(objective, plan, at, items),
        only_given_starts=True,
        even_as=None if search.keep is None else search.keep.slots[at],
    )


def pull(objective: Objective, plan: Plan, at: int, items: Items) -> Array:
    """Seconds that each item costs on each rank by its neighbouring layers, ``[scenarios, items, ranks]``.

    Counted as mean port time: what all ports carry, over their number.
    """
    found = np.zeros((len(objective.workload.scenarios), items.number, objective.cluster.num_ranks))
    share = (1.0 / items.count)[items.expert][:, None]
    for number, scenario in enumerate(objective.workload.scenarios):
        moves = scenario.transitions
        if moves is None or objective.communication[number] != "resident":
            continue
        if at:
            cost = _copy_cost(objective, number, at)
            arriving = moves[at - 1].T @ objective.rank_shares(plan.slots[at - 1])
            found[number] += (arriving[items.expert] * share) @ cost
        if at + 1 < plan.num_layers:
            cost = _copy_cost(objective, number, at + 1)
            leaving = moves[at] @ objective.rank_shares(plan.slots[at + 1])
            found[number] += (leaving[items.expert] * share) @ cost.T
    return found


def _copy_cost(objective: Objective, number: int, at: int) -> Array:
    """Seconds of mean port time for one copy per token from rank to rank, ``[ranks, ranks]``."""
    cluster, ports = objective.cluster, objective.ports
    node = cluster.node_of_rank
    between = ports.node_cost[np.ix_(node, node)] / cluster.num_nodes
    inside = np.where(cluster.same_node, ports.rank_cost[None, :] / cluster.num_ranks, 0.0)
    np.fill_diagonal(inside, 0.0)
    tokens = float(objective.workload.scenarios[number].tokens[:, at].mean())
    cost: Array = (between + inside) * tokens * objective.model.combine_bytes
    return cost


def _grouped(objective: Objective, slots: SlotCounts, by_rank: bool, seed: int) -> Plan:
    """Groups of every layer by shared neighbours, assigned to ranks along the chain."""
    model, cluster = objective.model, objective.cluster
    ranks = cluster.num_ranks
    moves = _mean_transitions(objective)
    layers, places = [], []
    for at, size in enumerate(slots):
        items = items_of(objective, at, cells_of(objective, at, int(size), "free").count)
        places.append(_clusters(_likeness(moves, at, items), cluster.node_sizes, int(size), by_rank, seed))
        layers.append(items)
    hold = [_shares(items, place, ranks) for items, place in zip(layers, places, strict=True)]
    flows = np.stack([hold[at].T @ moves[at] @ hold[at + 1] for at in range(len(moves))]) if len(moves) else None
    if flows is not None:
        cost = np.mean([_copy_cost(objective, n, 0) for n in range(len(objective.workload.scenarios))], axis=0)
        chain = assign_chain(flows, cost, seed=seed)
        places = [own[place] for own, place in zip(chain, places, strict=True)]
    tables = []
    for items, place in zip(layers, places, strict=True):
        table = table_of(place, items, ranks)
        tables.append(without_duplicates(table, model.num_experts) if duplicates(table) else table)
    return Plan(model.num_experts, model.layer_ids, model.num_hidden_layers, tuple(tables), model.name, "grouped")


def _mean_transitions(objective: Objective) -> Array:
    scenarios = objective.workload.scenarios
    known = [(w, s.transitions) for w, s in zip(objective.weights, scenarios, strict=True) if s.transitions is not None]
    total: Array = np.sum([weight * moves for weight, moves in known], axis=0)
    return total


def _likeness(moves: Array, at: int, items: Items) -> Array:
    """How alike items' neighbours are: products of rows normalised by how often experts are used."""
    total = np.zeros((items.number, items.number))
    share = (1.0 / items.count)[items.expert][:, None]
    for table in ([moves[at]] if at < len(moves) else []) + ([moves[at - 1].T] if at else []):
        use = np.maximum(table.sum(0), 1e-12)
        rows = table[items.expert] * share / np.sqrt(use)
        total += rows @ rows.T
    np.fill_diagonal(total, 0.0)
    return total


def _clusters(likeness: Array, node_sizes: Ints, size: int, by_rank: bool, seed: int) -> Ints:
    """The rank-sized cluster of each item: at once, or by node first."""
    if by_rank or len(node_sizes) == 1:
        return grouping.clusters(likeness, np.full(int(node_sizes.sum()), size), seed)
    node = grouping.clusters(likeness, node_sizes * size, seed)
    rank = np.empty(len(likeness), dtype=np.int64)
    for number, ranks in enumerate(node_sizes):
        own = np.flatnonzero(node == number)
        inner = grouping.clusters(likeness[np.ix_(own, own)], np.full(int(ranks), size), seed)
        rank[own] = int(node_sizes[:number].sum()) + inner
    return rank


def _shares(items: Items, place: Ints, ranks: int) -> Array:
    """Part of each expert's tokens in each cluster, ``[experts, ranks]``."""
    found = np.zeros((len(items.count), ranks))
    np.add.at(found, (items.expert, place), 1.0 / items.count[items.expert])
    return found
