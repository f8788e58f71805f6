"""All layers at once by simulated annealing: random swaps, worse ones too with a chance that falls as it cools down.

Under "min-max" many scenarios are equally bad near the optimum. A swap that helps one then hurts another, so that a
search which takes only what helps ends early; here it may pass through what is a little worse (Kirkpatrick, Gelatt and
Vecchi, Science 220, 1983). It needs many cheap steps, so traffic must follow from sums over the experts of a place:
messages, or chances where experts are taken to be chosen independently.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from regraft.solvers.placement.auto.descent import Clock
from regraft.solvers.placement.auto.items import Array, items_of, ranks_of, table_of
from regraft.solvers.placement.auto.layer import LayerTask, frame_of
from regraft.solvers.placement.auto.state import WORST_BALANCE
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Slots

#: Highest first temperature, lowest first and last temperature, in parts of one layer's share of the cost.
_HOTTEST, _WARM, _COLD = 0.1, 0.003, 0.001
#: How much warmer a swap more for each slot allows to start: what is stirred up must come to rest again.
_WARMER = 5e-5
#: Steps until the first look at the clock, and between looks; the schedule is fitted to the time that is left.
_FIRST_STRIDE, _STRIDE = 100, 2000


@dataclass(frozen=True)
class AnnealTask:
    """The layers with one table each to start from, ``steps`` swaps in all, in at most ``seconds``."""

    layers: tuple[LayerTask, ...]
    steps: int
    seed: int
    seconds: float | None


def can_anneal(objective: Objective) -> bool:
    """Whether traffic follows from sums over experts, and layers do not depend on each other."""
    kinds = set(objective.communication)
    counted = all(scenario.experts is None for scenario in objective.workload.scenarios)
    return kinds == {"per-expert"} or (kinds == {"dispatch"} and counted)


def anneal(task: AnnealTask) -> tuple[Slots, ...]:
    """The best tables found, one a layer; those of the start where nothing is better."""
    walk = _Walk([_Layer(layer) for layer in task.layers])
    clock, generator = Clock.after(task.seconds), np.random.default_rng(task.seed)
    started, total, done = time.monotonic(), task.steps, 0
    while done < total and not clock.out:
        stride = min(_STRIDE if done else _FIRST_STRIDE, total - done)
        hot = walk.temperature(total)
        which = generator.integers(0, len(walk.layers), stride).tolist()
        firsts, seconds = generator.random((2, stride)).tolist()
        for number, chance in enumerate(generator.exponential(size=stride).tolist()):
            temperature = hot * (walk.unit * _COLD / hot) ** ((done + number) / total)
            walk.step(which[number], firsts[number], seconds[number], temperature * chance)
        done += stride
        if task.seconds is not None:
            total = min(total, max(done, int(done * task.seconds / max(time.monotonic() - started, 1e-9))))
    return walk.tables()


class _Walk:
    """All layers, what they come to together, and the best that they have been."""

    def __init__(self, layers: list[_Layer]) -> None:
        self.layers, self.objective = layers, layers[0].objective
        self.seconds = np.sum([layer.seconds for layer in layers], axis=0)
        self.uneven = np.sum([layer.uneven for layer in layers], axis=0) / len(layers)
        self.cost = self.least = self._cost(self.seconds, self.uneven)
        self.unit = self.cost / len(layers)
        self.best = [layer.rank.copy() for layer in layers]
        self.changed: set[int] = set()

    def temperature(self, steps: int) -> float:
        """Where so many steps in all begin."""
        per_slot = steps / sum(layer.items.number for layer in self.layers)
        return self.unit * min(_HOTTEST, max(_WARM, _WARMER * per_slot))

    def step(self, at: int, first: float, second: float, worse: float) -> None:
        """Swap two items of a layer, drawn by ``first`` and ``second`` in [0, 1), unless that costs ``worse`` more."""
        layer = self.layers[at]
        pair = int(first * layer.items.number), int(second * layer.items.number)
        if not layer.allowed(*pair):
            return
        sums = layer.swapped(*pair)
        own_seconds, own_uneven = layer.measured(*sums)
        seconds = self.seconds + (own_seconds - layer.seconds)
        uneven = self.uneven + (own_uneven - layer.uneven) / len(self.layers)
        cost = self._cost(seconds, uneven)
        if cost > self.cost + worse:
            return
        layer.accept(pair, sums, own_seconds, own_uneven)
        self.seconds, self.uneven, self.cost = seconds, uneven, cost
        self.changed.add(at)
        if cost < self.least:
            self.least = cost
            for other in self.changed:
                self.best[other] = self.layers[other].rank.copy()
            self.changed.clear()

    def tables(self) -> tuple[Slots, ...]:
        """The best tables."""
        ranks = self.objective.cluster.num_ranks
        return tuple(table_of(rank, own.items, ranks) for rank, own in zip(self.best, self.layers, strict=True))

    def _cost(self, seconds: Array, uneven: Array) -> float:
        return float((seconds / self.objective.ideal).max()) + WORST_BALANCE * float(uneven.max())


class _Layer:
    """One layer's sums over the items of each place, and the seconds and unevenness of each scenario from them.

    Rows of ``by_rank`` ``[rows, items]`` are tokens in each batch, then activated experts where these depend on the
    place, then what each scenario sends; ``by_node`` ``[scenarios, items]`` is what it sends too.
    """

    def __init__(self, task: LayerTask) -> None:
        self.objective, at = task.objective, task.at
        cluster, (table,) = self.objective.cluster, task.tables
        self.items = items_of(self.objective, at, np.bincount(table.reshape(-1), minlength=task.num_experts))
        self.rank = ranks_of(table, self.items)
        self.frame = frame_of(task, self.items, self.rank)
        self.node = cluster.node_of_rank
        self.holds = np.zeros((cluster.num_ranks, task.num_experts), dtype=bool)
        self.holds[self.rank, self.items.expert] = True
        tokens = np.array([scenario.tokens[:, at].mean() for scenario in self.objective.workload.scenarios])
        self.bytes = tokens * (self.objective.model.dispatch_bytes + self.objective.model.combine_bytes)
        self.mean_load = np.maximum(self.items.load.sum(1) / cluster.num_ranks, 1e-12)
        self.constant_reads = bool((self.items.reads == 1.0).all())
        self.chances = self.objective.communication[0] == "dispatch"
        self.by_node = self._sent(tokens)
        rows = [self.items.load, *([] if self.constant_reads else [self.items.reads]), self.by_node]
        self.by_rank = np.concatenate(rows)
        self.ranks = self.by_rank @ np.eye(cluster.num_ranks)[self.rank]
        self.nodes = self.ranks[-len(tokens) :] @ cluster.membership
        self.seconds, self.uneven = self.measured(self.ranks, self.nodes)

    def allowed(self, first: int, second: int) -> bool:
        """Whether a swap keeps every rank free of second copies and respects fixed items, domains and kin."""
        frame, expert = self.frame, self.items.expert
        here, there = self.rank[first], self.rank[second]
        if here == there or self.holds[there, expert[first]] or self.holds[here, expert[second]]:
            return False
        if frame.fixed is not None and (frame.fixed[first] or frame.fixed[second]):
            return False
        if frame.domain is not None and frame.domain[here] != frame.domain[there]:
            return False
        return frame.kin is None or bool(frame.kin[first] == frame.kin[second])

    def swapped(self, first: int, second: int) -> tuple[Array, Array]:
        """Sums by rank and by node after two items change ranks."""
        here, there = self.rank[first], self.rank[second]
        ranks, nodes = self.ranks.copy(), self.nodes
        change = self.by_rank[:, second] - self.by_rank[:, first]
        ranks[:, here] += change
        ranks[:, there] -= change
        if self.node[here] != self.node[there]:
            nodes = nodes.copy()
            change = self.by_node[:, second] - self.by_node[:, first]
            nodes[:, self.node[here]] += change
            nodes[:, self.node[there]] -= change
        return ranks, nodes

    def measured(self, ranks: Array, nodes: Array) -> tuple[Array, Array]:
        """Seconds and unevenness, ``[scenarios]`` each, from sums by rank and by node."""
        objective, rows = self.objective, len(self.mean_load)
        load = ranks[:rows]
        reads = self.reads if self.constant_reads else ranks[rows : 2 * rows] / objective.reads
        busy = np.maximum(load / objective.rates, reads).max(1)
        uneven = self.items.mean @ (load.max(1) / self.mean_load) - 1.0
        sent, between = ranks[-len(nodes) :], nodes
        if self.chances:
            sent, between = -np.expm1(sent), -np.expm1(between)
        port = (sent * objective.ports.ranks).max(1)
        if nodes.shape[1] > 1:
            port = np.maximum(port, (between @ objective.ports.nodes).max(1))
        fixed = objective.cluster.launch + objective.latency
        return self.items.mean @ busy + self.bytes * port + fixed, uneven

    def accept(self, pair: tuple[int, int], sums: tuple[Array, Array], seconds: Array, uneven: Array) -> None:
        """Let two items change ranks."""
        first, second = pair
        here, there, expert = self.rank[first], self.rank[second], self.items.expert
        self.holds[here, expert[first]] = self.holds[there, expert[second]] = False
        self.holds[there, expert[first]] = self.holds[here, expert[second]] = True
        self.rank[first], self.rank[second] = there, here
        (self.ranks, self.nodes), self.seconds, self.uneven = sums, seconds, uneven

    @property
    def reads(self) -> Array:
        """Seconds that each rank reads weights for, where every copy is activated in every batch."""
        size = self.items.number // self.objective.cluster.num_ranks
        seconds: Array = size / self.objective.reads
        return seconds

    def _sent(self, tokens: Array) -> Array:
        """Of each item and scenario: messages per token, or the logarithm of the chance that a token misses it."""
        sent: Array = (self.items.mean @ self.items.load) / np.maximum(tokens, 1e-12)[:, None]
        return np.log1p(-np.minimum(sent, 1.0 - 1e-9)) if self.chances else sent
