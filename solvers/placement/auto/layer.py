"""One layer by itself: starts from baselines, from loads and from co-activation, then local search.

A task holds only its layer's part of the trace, so that it can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.auto import grouping
from regraft.solvers.placement.auto.cells import cells_of, pin
from regraft.solvers.placement.auto.descent import Clock, descend, search
from regraft.solvers.placement.auto.items import Array, Ints, Items, items_of, ranks_of, table_of
from regraft.solvers.placement.auto.neighbourhood import improve
from regraft.solvers.placement.auto.packing import level, pack_items
from regraft.solvers.placement.auto.state import Frame, State
from regraft.solvers.placement.metrics import balancedness
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Slots
from regraft.solvers.placement.repair import duplicates, without_duplicates
from regraft.solvers.placement.workload import Workload

#: More tokens than any sample has.
_ALL = 1 << 40
#: How much more balanced than the table to keep up with: a margin for batches that were not seen.
_MARGIN = 1.008


@dataclass(frozen=True)
class Effort:
    """How much is tried. Steps and rounds are counted, not timed, so that the result does not depend on the machine."""

    #: Batches and tokens of each scenario that the search looks at; the choice at the end looks at all.
    batches: int = 16
    tokens: int = 4096
    steps: int = 120
    #: Kicks per layer for the largest problems; smaller ones get more, up to 20 times as many.
    rounds: int = 6
    #: Integer programs per layer, over a few ranks at a time.
    programs: int = 1
    #: Steps at the end that look at all tokens, and at this many batches.
    last_steps: int = 12
    last_batches: int = 64
    #: Random swaps per slot where all layers are annealed at once.
    swaps: int = 2000


@dataclass(frozen=True)
class LayerTask:
    """What is needed to solve layer ``at`` of ``objective`` (by position).

    ``tables`` are valid starts; ``offset`` ``[scenarios]`` are the other layers' seconds; ``pull`` what ``Frame`` says.
    """

    objective: Objective
    at: int
    size: int
    tables: tuple[Slots, ...]
    groups: str
    pinned: dict[int, int]
    offset: Array
    effort: Effort
    seed: int
    seconds: float | None
    pull: Array | None = field(default=None, repr=False)
    only_given_starts: bool = False
    #: The table whose balancedness is not to be fallen below; None: balance is no aim of its own.
    even_as: Slots | None = None
    #: Under "min-max": unevenness of the other layers, ``[scenarios]``, as a mean over all, and this layer's part.
    uneven: Array | None = None
    part: float = 1.0

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.objective.model.num_experts


def layer_objective(objective: Objective, at: int) -> Objective:
    """The objective of one layer alone; slowdowns still refer to the whole model. Not for the resident model."""
    workload = objective.workload
    layer = slice(at, at + 1)
    scenarios = tuple(
        replace(
            scenario,
            counts=scenario.counts[:, layer],
            tokens=scenario.tokens[:, layer],
            experts=None if scenario.experts is None else scenario.experts[:, layer],
            transitions=None,
        )
        for scenario in workload.scenarios
    )
    ids = (workload.layer_ids[at],)
    part = Workload(workload.num_experts, workload.top_k, ids, scenarios, workload.num_hidden_layers)
    alone = objective.on(part)
    alone.model = replace(objective.model, layer_ids=ids)
    return alone


def solve_layer(task: LayerTask) -> Slots:
    """The best table found for the layer, ``[ranks, slots]``, within the task's seconds."""
    clock = Clock.after(task.seconds)
    whole, task = task, _thinned(task, task.effort.batches, task.effort.tokens)
    state: State | None = None
    for items, rank in _starts(task):
        if state is not None and clock.out:
            break
        trial = State(task.objective, task.at, items, rank, frame_of(task, items, rank))
        descend(trial, task.effort.steps // 4, clock)
        if state is None or trial.score < state.score:
            state = trial
    assert state is not None
    state = search(state, task.effort.rounds, task.effort.steps, task.seed, clock)
    state = improve(state, task.effort.programs, task.seed, clock)
    state = _finished(whole, state, clock)
    return table_of(state.rank, state.items, task.objective.cluster.num_ranks)


def _thinned(task: LayerTask, batches: int, tokens: int) -> LayerTask:
    """The same task on less of the trace."""
    return replace(task, objective=task.objective.on(task.objective.workload.thinned(batches, tokens)))


def _finished(task: LayerTask, state: State, clock: Clock) -> State:
    """A few steps more that look at all tokens, so that what was won is not the small sample's own."""
    if clock.out:
        return state
    last = _thinned(task, task.effort.last_batches, _ALL)
    items = items_of(last.objective, last.at, state.items.count)
    final = State(last.objective, last.at, items, state.rank, frame_of(last, items, state.rank))
    descend(final, task.effort.last_steps, clock)
    return final


def _starts(task: LayerTask) -> Iterator[tuple[Items, Ints]]:
    """The best of the given tables, then loads alone, then co-activation; pins are kept in each."""
    yield _best_given(task)
    if task.only_given_starts:
        return
    for items, rank in _made_starts(task):
        apart = _apart(task, items, rank)
        if apart is not None:
            items, rank = apart
            yield items, pin(rank, items.expert, task.pinned)


def _made_starts(task: LayerTask) -> Iterator[tuple[Items, Ints]]:
    cells = cells_of(task.objective, task.at, task.size, task.groups)
    items = items_of(task.objective, task.at, cells.count)
    yield items, _packed(task, items, cells.cell_of_item(items), cells.cell_of_rank)
    useful = task.pull is None and set(task.objective.communication) == {"dispatch"}
    if useful and task.groups == "free" and all(tokens is not None for tokens in items.tokens):
        for by_rank in (False, True):
            yield items, _grouped(task, items, by_rank)


def _apart(task: LayerTask, items: Items, rank: Ints) -> tuple[Items, Ints] | None:
    """The start with no expert twice on a rank: copies that groups brought together are swapped away. None where groups
    forbid that.
    """
    table = table_of(rank, items, task.objective.cluster.num_ranks)
    if not duplicates(table):
        return items, rank
    if task.groups != "free":
        return None
    weight = np.bincount(items.expert, items.weight, minlength=task.num_experts) / np.maximum(items.count, 1)
    table = without_duplicates(table, task.num_experts, weight)
    items = items_of(task.objective, task.at, np.bincount(table.reshape(-1), minlength=task.num_experts))
    return items, ranks_of(table, items)


def _best_given(task: LayerTask) -> tuple[Items, Ints]:
    made = []
    for table in task.tables:
        items = items_of(task.objective, task.at, np.bincount(table.reshape(-1), minlength=task.num_experts))
        rank = ranks_of(table, items)
        made.append((State(task.objective, task.at, items, rank, frame_of(task, items, rank)).score, items, rank))
    _, items, rank = min(made, key=lambda entry: entry[0])
    return items, rank


def _packed(task: LayerTask, items: Items, cell: Ints, cell_of_rank: Ints) -> Ints:
    speed, weight = task.objective.cluster.speed, items.weight
    rank = pack_items(weight, items.expert, cell, cell_of_rank, speed, task.size)
    return level(weight, items.expert, rank, cell_of_rank, speed)


def _grouped(task: LayerTask, items: Items, by_rank: bool) -> Ints:
    """Experts chosen together on one node, packed there by load, or grouped again by rank."""
    cluster = task.objective.cluster
    together = grouping.coactivation(items)
    node = grouping.clusters(together, cluster.node_sizes * task.size, task.seed)
    if not by_rank:
        return _packed(task, items, node, cluster.node_of_rank)
    rank = np.empty(items.number, dtype=np.int64)
    for number, ranks in enumerate(cluster.node_sizes):
        own = np.flatnonzero(node == number)
        sizes = np.full(int(ranks), task.size)
        first = int(cluster.node_sizes[:number].sum())
        rank[own] = first + grouping.clusters(together[np.ix_(own, own)], sizes, task.seed)
    return rank


def frame_of(task: LayerTask, items: Items, rank: Ints) -> Frame:
    """What the search of this task is told; ``rank`` ``[items]`` is where it starts."""
    model, cluster = task.objective.model, task.objective.cluster
    fixed: NDArray[np.bool_] | None = None
    if task.pinned:
        fixed = np.array([task.pinned.get(int(e)) == int(r) for e, r in zip(items.expert, rank, strict=True)])
    floor = np.zeros(len(task.offset))
    if task.even_as is not None:
        floor = _balance(task, task.even_as) * _MARGIN
    return Frame(
        task.offset,
        floor,
        task.pull,
        fixed,
        cluster.node_of_rank if task.groups == "node" else None,
        items.expert // (model.num_experts // model.num_groups) if task.groups == "block" else None,
        _scale(task),
        task.uneven,
        task.part,
    )


def _balance(task: LayerTask, table: Slots) -> Array:
    """Balancedness of a table, ``[scenarios]``."""
    objective = task.objective
    return np.array(
        [
            balancedness(objective.loads(number, task.at, table).tokens).mean()
            for number in range(len(objective.workload.scenarios))
        ]
    )


def _scale(task: LayerTask) -> float:
    """The layer's part of the objective with perfect balance."""
    objective = task.objective
    ideal = [s.counts[:, task.at].sum(1).mean() / objective.rates.sum() for s in objective.workload.scenarios]
    return float(objective.joined(np.array(ideal)))
