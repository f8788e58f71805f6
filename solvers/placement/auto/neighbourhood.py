"""Large-neighbourhood search: the items of a few ranks are dealt anew by an integer program, warm-started.

The program minimises the largest rank time of every batch exactly; traffic enters by what moving one item alone would
change. A solution is kept only where the true score falls.
"""

from __future__ import annotations

import numpy as np
import pulp

from regraft.solvers.placement.auto.descent import Clock, descend
from regraft.solvers.placement.auto.items import Array, Ints
from regraft.solvers.placement.auto.reach import TokenReach
from regraft.solvers.placement.auto.state import State
from regraft.solvers.placement.ilp import solve

_RANKS = 3
_ROWS = 8
_NODES = 40
_MOST_ITEMS = 80


def improve(state: State, programs: int, seed: int, clock: Clock) -> State:
    """Solve ``programs`` integer programs around the hottest ranks, and descend after each. The best state found."""
    cluster = state.objective.cluster
    if cluster.num_ranks < 2:
        return state
    generator = np.random.default_rng(seed)
    for number in range(programs):
        if clock.out:
            break
        ranks = _choose(state, generator, number)
        items = np.flatnonzero(np.isin(state.rank, ranks))
        if len(items) > _MOST_ITEMS:
            ranks, items = ranks[:2], np.flatnonzero(np.isin(state.rank, ranks[:2]))
        if len(items) > _MOST_ITEMS:
            break
        dealt = _deal(state, ranks, items, clock)
        trial = None if dealt is None else _moved(state, items, dealt)
        if trial is None:
            continue
        descend(trial, 8, clock)
        if trial.score < state.score * (1.0 - 1e-9):
            state = trial
    return state


def _choose(state: State, generator: np.random.Generator, number: int) -> Ints:
    """The hottest rank and random others of its domain."""
    hottest = state.hottest(number // 2 + 1)
    hot = int(hottest[-1])
    others = np.setdiff1d(np.arange(state.objective.cluster.num_ranks), [hot])
    if state.frame.domain is not None:
        others = others[state.frame.domain[others] == state.frame.domain[hot]]
    chosen = generator.permutation(others)[: _RANKS - 1]
    return np.concatenate([[hot], np.sort(chosen)])


def _deal(state: State, ranks: Ints, items: Ints, clock: Clock) -> Ints | None:
    """The rank of each of ``items`` by the program; None where it finds nothing."""
    rows = np.unique(np.linspace(0, len(state.load) - 1, min(_ROWS, len(state.load))).round().astype(int))
    unit = float(state.mean_load.mean())
    program = pulp.LpProblem("deal", pulp.LpMinimize)
    at = {
        (i, r): pulp.LpVariable(f"x_{i}_{r}", cat=pulp.LpBinary) for i in range(len(items)) for r in range(len(ranks))
    }
    peak = [pulp.LpVariable(f"peak_{b}", lowBound=0.0) for b in range(len(rows))]
    linear = _linear_costs(state, ranks, items)
    emphasis = (state.objective.weights @ state.items.mean)[rows]
    emphasis = emphasis / max(emphasis.sum(), 1e-12)
    program += pulp.lpSum(float(w) * z for w, z in zip(emphasis, peak, strict=True)) + pulp.lpSum(
        float(linear[i, r]) * x for (i, r), x in at.items() if linear[i, r]
    )
    for i in range(len(items)):
        program += pulp.lpSum(at[i, r] for r in range(len(ranks))) == 1
    for r in range(len(ranks)):
        program += pulp.lpSum(at[i, r] for i in range(len(items))) == len(items) // len(ranks)
    _load_rows(program, state, (ranks, items, rows), at, peak, unit)
    _keep_apart(program, state, items, at, len(ranks))
    _keep_fixed(program, state, ranks, items, at)
    start = _start(state, ranks, items, rows, unit)
    outcome = solve(program, seconds=min(clock.left, 5.0), gap=1e-3, nodes=_NODES, start=start)
    if outcome.status == "none":
        return None
    chosen = np.array([[at[i, r].varValue or 0.0 for r in range(len(ranks))] for i in range(len(items))])
    dealt: Ints = ranks[chosen.argmax(1)]
    return dealt


def _load_rows(
    program: pulp.LpProblem,
    state: State,
    chosen: tuple[Ints, Ints, Ints],
    at: dict[tuple[int, int], pulp.LpVariable],
    peak: list[pulp.LpVariable],
    unit: float,
) -> None:
    """Every peak is at least each chosen rank's load over its speed, in mean loads."""
    ranks, items, rows = chosen
    speed = state.objective.cluster.speed
    for number, row in enumerate(rows):
        for r, rank in enumerate(ranks):
            load = state.items.load[row, items] / (unit * speed[rank])
            program += pulp.lpSum(float(load[i]) * at[i, r] for i in range(len(items))) <= peak[number]


def _keep_apart(
    program: pulp.LpProblem, state: State, items: Ints, at: dict[tuple[int, int], pulp.LpVariable], ranks: int
) -> None:
    expert = state.items.expert[items]
    for name in np.unique(expert):
        same = np.flatnonzero(expert == name)
        if len(same) > 1:
            for r in range(ranks):
                program += pulp.lpSum(at[int(i), r] for i in same) <= 1


def _keep_fixed(
    program: pulp.LpProblem, state: State, ranks: Ints, items: Ints, at: dict[tuple[int, int], pulp.LpVariable]
) -> None:
    frame = state.frame
    for i, item in enumerate(items):
        kept = frame.fixed is not None and bool(frame.fixed[item])
        for r, rank in enumerate(ranks):
            own = int(state.rank[item]) == int(rank)
            kin = frame.kin is not None and not (frame.kin[items[state.rank[items] == rank]] == frame.kin[item]).any()
            if (kept and not own) or (kin and not own):
                program += at[i, r] == 0


def _linear_costs(state: State, ranks: Ints, items: Ints) -> Array:
    """What moving one item alone changes, in mean rank loads' time, ``[items, ranks]``."""
    cost = np.zeros((len(items), len(ranks)))
    second = float((state.mean_load.mean()) / state.objective.rates.mean())
    weights = state.objective.weights
    if state.pulls is not None:
        cost += np.tensordot(weights, state.pulls, 1)[np.ix_(items, ranks)] / second
    node = state.objective.cluster.node_of_rank[ranks]
    price = state.tokens * state.bytes
    for reach, place, ports in (
        (state.nodes, node, state.objective.ports.nodes.mean(1)),
        (state.ranks, ranks, state.objective.ports.ranks / len(state.objective.ports.ranks)),
    ):
        if isinstance(reach, TokenReach):
            scale = weights * price / reach.sizes
            away = np.tensordot(scale, reach.joins, 1)[np.ix_(items, place)]
            own = (scale @ reach.alone)[items]
            stays = reach.place[items][:, None] == place[None, :]
            cost += np.where(stays, 0.0, away - own[:, None]) * ports[place][None, :] / second
    return cost


def _start(state: State, ranks: Ints, items: Ints, rows: Ints, unit: float) -> dict[str, float]:
    start = {
        f"x_{i}_{r}": float(state.rank[item] == rank) for i, item in enumerate(items) for r, rank in enumerate(ranks)
    }
    time = state.load[np.ix_(rows, ranks)] / (unit * state.objective.cluster.speed[ranks])
    start.update({f"peak_{number}": float(value) for number, value in enumerate(time.max(1))})
    return start


def _moved(state: State, items: Ints, dealt: Ints) -> State | None:
    """The state with items on their new ranks; None where nothing changed."""
    if (state.rank[items] == dealt).all():
        return None
    rank = state.rank.copy()
    rank[items] = dealt
    return State(state.objective, state.at, state.items, rank, state.frame)
