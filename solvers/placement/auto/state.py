"""A layer's assignment during local search: its score, and the scores of many swaps at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.auto.items import Array, Ints, Items
from regraft.solvers.placement.auto.reach import ChanceReach, MessageReach, Reach, TokenReach
from regraft.solvers.placement.objective import Objective

#: Weight of mean port time beside the busiest port's: it leads across plateaus, and stays small in the result.
_MEAN_PORT = 0.1
#: Weight of token balance where the layer's time does not depend on it (all ranks read the same weights).
_BALANCE = 0.02
#: Weight of falling below the balancedness to keep up with.
_FLOOR = 2.0
#: Under "min-max", weight of the worst scenario's unevenness (largest over mean rank load, less one) beside its
#: slowdown. Plans of near equal slowdown differ much in balance, and counts alone say little of traffic.
WORST_BALANCE = 1.0
#: Most ranks for which exact tables by rank are kept; beyond, copies into a rank are taken for messages.
_RANK_TABLES = 72


@dataclass
class Frame:
    """What the search of one layer is given besides its items.

    - ``offset`` ``[scenarios]``: seconds of the other layers, for a joined objective;
    - ``floor`` ``[scenarios]``: the balancedness not to fall below, 0 for none;
    - ``pull`` ``[scenarios, items, ranks]``: seconds that an item costs on a rank by its neighbours in other layers;
    - ``fixed`` items do not move;
    - ``domain`` ``[ranks]``: items swap only between ranks of one domain (a node, where router groups are kept whole);
    - ``kin`` ``[items]``: items swap only with their like;
    - ``uneven`` ``[scenarios]`` and ``part``, under "min-max": the mean unevenness of all layers without this one, and
      what part of the mean this one is.
    """

    offset: Array
    floor: Array
    pull: Array | None = None
    fixed: NDArray[np.bool_] | None = None
    domain: Ints | None = None
    kin: Ints | None = None
    scale: float = 1.0
    uneven: Array | None = None
    part: float = 1.0


class State:
    """Items on ranks. Scores are joined seconds (or slowdowns) plus small terms that lead the search."""

    def __init__(self, objective: Objective, at: int, items: Items, rank: Ints, frame: Frame) -> None:
        self.objective, self.at, self.items, self.frame = objective, at, items, frame
        cluster = objective.cluster
        self.rank = rank.copy()
        self.tokens = np.array([s.tokens[:, at].mean() for s in objective.workload.scenarios])
        self.load = _sums(items.load, rank, cluster.num_ranks)
        self.reads = _sums(items.reads, rank, cluster.num_ranks)
        self.constant_reads = bool((items.reads == 1.0).all())
        self.mean_load = np.maximum(items.load.sum(1) / cluster.num_ranks, 1e-12)
        self.holds = np.zeros((cluster.num_ranks, len(items.count)), dtype=bool)
        self.holds[rank, items.expert] = True
        self.nodes, self.ranks = self._reaches()
        self.bytes = _bytes(objective)
        self.pulls = None if frame.pull is None else frame.pull
        self.score = self._current()

    def copy(self) -> State:
        """The same state, to change apart."""
        twin = object.__new__(State)
        twin.__dict__.update(self.__dict__)
        twin.rank, twin.load, twin.reads = self.rank.copy(), self.load.copy(), self.reads.copy()
        twin.holds = self.holds.copy()
        twin.nodes = None if self.nodes is None else self.nodes.copy()
        twin.ranks = None if self.ranks is None else self.ranks.copy()
        return twin

    def allowed(self, first: Ints, second: Ints) -> NDArray[np.bool_]:
        """Which swaps keep every rank free of second copies and respect fixed items, domains and kin."""
        frame, expert = self.frame, self.items.expert
        here, there = self.rank[first], self.rank[second]
        fine: NDArray[np.bool_] = (
            (here != there) & ~self.holds[there, expert[first]] & ~self.holds[here, expert[second]]
        )
        if frame.fixed is not None:
            fine &= ~frame.fixed[first] & ~frame.fixed[second]
        if frame.domain is not None:
            fine &= frame.domain[here] == frame.domain[there]
        if frame.kin is not None:
            fine &= frame.kin[first] == frame.kin[second]
        return fine

    def scores(self, first: Ints, second: Ints) -> Array:
        """The score after each swap alone, ``[swaps]``."""
        here, there = self.rank[first], self.rank[second]
        load_here, load_there = self._moved(self.load, self.items.load, first, second)
        rates, reads = self.objective.rates, self.objective.reads
        busy = self._busy(self.load, self.reads)
        if self.constant_reads:
            read_here, read_there = self.reads[:, here], self.reads[:, there]
        else:
            read_here, read_there = self._moved(self.reads, self.items.reads, first, second)
        busy_here = np.maximum(load_here / rates[here], read_here / reads[here])
        busy_there = np.maximum(load_there / rates[there], read_there / reads[there])
        slowest = np.maximum(_others_largest(busy, here, there), np.maximum(busy_here, busy_there))
        largest = np.maximum(_others_largest(self.load, here, there), np.maximum(load_here, load_there))
        seconds = self.items.mean @ slowest + self.objective.cluster.launch
        seconds = seconds + self._traffic(first, second) + self._pull(first, second)
        return self._joined(seconds, largest)

    def swap(self, first: int, second: int) -> None:
        """Let two items change ranks."""
        items = self.items
        here, there = int(self.rank[first]), int(self.rank[second])
        for sums, own in ((self.load, items.load), (self.reads, items.reads)):
            change = own[:, second] - own[:, first]
            sums[:, here] += change
            sums[:, there] -= change
        self.holds[here, items.expert[first]] = self.holds[there, items.expert[second]] = False
        self.holds[there, items.expert[first]] = self.holds[here, items.expert[second]] = True
        self.rank[first], self.rank[second] = there, here
        for reach in (self.nodes, self.ranks):
            if reach is not None:
                reach.swap(first, second)
        self.score = self._current()

    def hottest(self, number: int) -> Ints:
        """Ranks in the order in which they hold their layer up, at most ``number``."""
        busy = self._busy(self.load, self.reads)
        slow = busy / busy.max(1, keepdims=True)
        emphasis = self.objective.weights @ self.items.mean
        seconds = self.items.mean @ busy.max(1) + self.frame.offset
        if self.objective.aggregate == "min-max":
            slowdown = seconds / self.objective.ideal
            emphasis = (slowdown >= slowdown.max() * (1.0 - 1e-3)) @ self.items.mean
        votes: Array = emphasis @ (slow**16)
        return np.argsort(-votes, kind="stable")[:number]

    def _busy(self, load: Array, reads: Array) -> Array:
        busy: Array = np.maximum(load / self.objective.rates, reads / self.objective.reads)
        return busy

    def _moved(self, sums: Array, own: Array, first: Ints, second: Ints) -> tuple[Array, Array]:
        change = own[:, second] - own[:, first]
        return sums[:, self.rank[first]] + change, sums[:, self.rank[second]] - change

    def _current(self) -> float:
        """The score as it stands: that of swapping an item with itself."""
        none = np.zeros(1, dtype=np.int64)
        return float(self.scores(none, none)[0])

    def _joined(self, seconds: Array, largest: Array) -> Array:
        objective, mean = self.objective, self.items.mean
        joined: Array = objective.joined(seconds + self.frame.offset[:, None])
        uneven = mean @ (largest / self.mean_load[:, None]) - 1.0
        scale = self.frame.scale
        if self.frame.uneven is not None:
            joined += WORST_BALANCE * (self.frame.uneven[:, None] + self.frame.part * uneven).max(0)
            return joined
        joined = joined + scale * _BALANCE * (objective.weights @ uneven)
        if self.frame.floor.any():
            even = mean @ (self.mean_load[:, None] / largest)
            joined = joined + _FLOOR * scale * np.maximum(self.frame.floor[:, None] - even, 0.0).sum(0)
        return joined

    def _pull(self, first: Ints, second: Ints) -> Array | float:
        if self.pulls is None:
            return 0.0
        item = np.arange(self.items.number)
        here, there = self.rank[first], self.rank[second]
        base = self.pulls[:, item, self.rank].sum(1)[:, None]
        moved: Array = (
            base
            + self.pulls[:, first, there]
            + self.pulls[:, second, here]
            - self.pulls[:, first, here]
            - self.pulls[:, second, there]
        )
        return moved

    def _traffic(self, first: Ints, second: Ints) -> Array | float:
        """Seconds of traffic after each swap, ``[scenarios, swaps]``."""
        busiest: Array | float = 0.0
        mean: Array | float = 0.0
        ports = self.objective.ports
        if self.nodes is not None:
            parts = _parts_after(self.nodes, first, second)
            busiest = (parts @ ports.nodes).max(-1)
            mean = parts @ ports.nodes.mean(1)
        if self.ranks is not None:
            at_first, at_second = self.ranks.after(first, second)
            here, there = self.rank[first], self.rank[second]
            own = np.maximum(at_first * ports.ranks[here], at_second * ports.ranks[there])
            costs = self.ranks.parts * ports.ranks
            busiest = np.maximum(busiest, np.maximum(_others_largest(costs, here, there), own))
            if self.nodes is not None:
                return self._seconds_of(busiest, mean)
            change = (at_first - self.ranks.parts[:, here]) * ports.ranks[here]
            change += (at_second - self.ranks.parts[:, there]) * ports.ranks[there]
            mean = mean + (costs.sum(1)[:, None] + np.where(here == there, 0.0, change)) / len(ports.ranks)
        return self._seconds_of(busiest, mean)

    def _seconds_of(self, busiest: Array | float, mean: Array | float) -> Array:
        seconds: Array = (self.tokens * self.bytes)[:, None] * (busiest + _MEAN_PORT * mean) + self.objective.latency
        return seconds

    def _reaches(self) -> tuple[Reach | None, Reach | None]:
        objective, cluster = self.objective, self.objective.cluster
        kinds = set(objective.communication)
        if kinds == {"resident"}:
            return None, None
        nodes = self._reach(cluster.node_of_rank[self.rank], cluster.num_nodes, True) if cluster.num_nodes > 1 else None
        exact = self.items.number > cluster.num_ranks and cluster.num_ranks <= _RANK_TABLES
        ranks = self._reach(self.rank, cluster.num_ranks, exact) if objective.ports.ranks.any() else None
        return nodes, ranks

    def _reach(self, place: Ints, number: int, exact: bool) -> Reach:
        if set(self.objective.communication) != {"dispatch"} or not exact:
            return MessageReach(self.items, place, number, self.tokens)
        if all(tokens is not None for tokens in self.items.tokens):
            return TokenReach(self.items, place, number)
        return ChanceReach(self.items, place, number, self.tokens)


def _bytes(objective: Objective) -> Array:
    both = objective.model.dispatch_bytes + objective.model.combine_bytes
    return np.array([0.0 if kind == "resident" else both for kind in objective.communication])


def _sums(rows: Array, place: Ints, number: int) -> Array:
    return rows @ np.eye(number)[place]


def _parts_after(reach: Reach, first: Ints, second: Ints) -> Array:
    """Parts at all places after each swap, ``[scenarios, swaps, places]``."""
    at_first, at_second = reach.after(first, second)
    parts = np.repeat(reach.parts[:, None, :], len(first), axis=1)
    swap = np.arange(len(first))
    parts[:, swap, reach.place[first]] = at_first
    parts[:, swap, reach.place[second]] = at_second
    return parts


def _others_largest(rows: Array, here: Ints, there: Ints) -> Array:
    """Largest entry of each row outside two columns, ``[rows, swaps]``."""
    number = rows.shape[1]
    if number <= 2:
        return np.zeros((len(rows), len(here)))
    top = np.argpartition(-rows, 2, axis=1)[:, :3] if number > 3 else np.tile(np.arange(3), (len(rows), 1))
    values = np.take_along_axis(rows, top, axis=1)
    order = np.argsort(-values, axis=1)
    top, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
    taken = [(top[:, n, None] == here) | (top[:, n, None] == there) for n in range(2)]
    return np.where(taken[0], np.where(taken[1], values[:, 2:3], values[:, 1:2]), values[:, 0:1])
