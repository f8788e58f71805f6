"""What placement needs to know of a trace, in a form that pieces of the trace can be summed in.

``observe`` turns one piece into statistics, ``merge`` adds two; the order of merging does not change the result, so
that pieces can be counted in any process and in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.trace import Batch, Counts, Experts, Trace

Task = TypeVar("Task")


@dataclass(frozen=True)
class Limits:
    """How much of a trace is kept besides its sums; what is kept is chosen by hash, whatever the order of arrival."""

    #: Batches whose counts are kept one by one, and tokens whose choices are kept, each per scenario and phase.
    batches: int = 256
    tokens: int = 8192
    coactivation: bool = True
    transitions: bool = True


@dataclass(frozen=True)
class Sample:
    """The rows with the lowest keys: a sample that does not depend on the order in which pieces were seen."""

    keys: NDArray[np.uint64]
    rows: NDArray[np.generic]

    def merge(self, other: Sample, limit: int) -> Sample:
        """The ``limit`` lowest of both, in order; both are in order."""
        keys, rows = other.keys, other.rows
        if len(self.keys) == limit:  # most of a long trace is turned away here, before anything is copied
            fits = int(np.searchsorted(keys, self.keys[-1]))
            if fits == 0:
                return self
            keys, rows = keys[:fits], rows[:fits]
        keys = np.concatenate([self.keys, keys])
        order = np.argsort(keys, kind="stable")[:limit]
        return Sample(keys[order], np.concatenate([self.rows, rows])[order])


@dataclass(frozen=True)
class Routing:
    """Statistics of one scenario and phase. Counts are tokens.

    ``counts`` is ``[layers, experts]``; ``coactivation`` ``[layers, experts, experts]`` how many tokens chose both
    experts (zero on the diagonal); ``transitions`` ``[layers - 1, experts, experts]`` how often a token that chose one
    chose the other in the next recorded layer: a token has ``top_k`` by ``top_k`` pairs. Sums are of whole numbers, so
    that they do not depend on the order of adding.
    """

    batches: int
    tokens: int
    counts: Counts
    #: Kept batches: rows are counts, ``[batches, layers, experts]``.
    kept: Sample
    #: Kept tokens: rows are choices, ``[tokens, layers, top_k]``; None where the trace has only counts.
    sample: Sample | None
    #: Source rank of each kept token, -1 where not known; in the order of ``sample``.
    sources: Sample | None
    coactivation: Counts | None
    transitions: NDArray[np.float64] | None

    def merge(self, other: Routing, limits: Limits) -> Routing:
        """The statistics of both pieces together."""
        sample = sources = None
        if self.sample is not None and other.sample is not None:
            assert self.sources is not None and other.sources is not None
            sample = self.sample.merge(other.sample, limits.tokens)
            sources = self.sources.merge(other.sources, limits.tokens)
        return Routing(
            self.batches + other.batches,
            self.tokens + other.tokens,
            self.counts + other.counts,
            self.kept.merge(other.kept, limits.batches),
            sample,
            sources,
            None if self.coactivation is None or other.coactivation is None else self.coactivation + other.coactivation,
            None if self.transitions is None or other.transitions is None else self.transitions + other.transitions,
        )


@dataclass(frozen=True)
class Statistics:
    """Statistics of a whole trace, by (scenario, phase)."""

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    num_hidden_layers: int
    routing: dict[tuple[str, str], Routing]
    limits: Limits = field(default_factory=Limits)
    model_name: str = ""

    @property
    def num_layers(self) -> int:
        """Expert layers."""
        return len(self.layer_ids)

    def merge(self, other: Statistics) -> Statistics:
        """Both together. Raises ``PlacementError`` where they are of different models."""
        mine = (self.num_experts, self.top_k, self.layer_ids)
        theirs = (other.num_experts, other.top_k, other.layer_ids)
        if mine != theirs:
            raise PlacementError(
                f"pieces of different models were given: (experts, top_k, layers) {mine} and {theirs}; "
                "expected pieces of one trace"
            )
        routing = dict(self.routing)
        for key, value in other.routing.items():
            routing[key] = routing[key].merge(value, self.limits) if key in routing else value
        return replace(self, routing=routing)

    def with_transitions(self, given: Mapping[str, NDArray[np.float64]]) -> Statistics:
        """With transitions that the trace holds itself, by scenario, where its tokens do not tell them."""
        routing = {
            (scenario, phase): replace(value, transitions=given[scenario])
            if value.transitions is None and scenario in given
            else value
            for (scenario, phase), value in self.routing.items()
        }
        return replace(self, routing=routing)


def observe(trace: Trace, limits: Limits | None = None, first_batch: int = 0) -> Statistics:
    """The statistics of one piece; ``first_batch`` is the piece's place in the whole trace, which the sample needs."""
    limits = limits or Limits()
    routing: dict[tuple[str, str], Routing] = {}
    for number, batch in enumerate(trace.batches):
        key = (batch.scenario, batch.phase)
        seen = _observe_batch(batch, trace, limits, first_batch + number)
        routing[key] = routing[key].merge(seen, limits) if key in routing else seen
    found = Statistics(
        trace.num_experts, trace.top_k, trace.layer_ids, trace.num_hidden_layers, routing, limits, trace.model_name
    )
    return found.with_transitions(trace.transitions)


def aggregate(
    pieces: Iterable[Trace | Callable[[], Trace]],
    limits: Limits | None = None,
    executor: Executor | None = None,
    batches_per_piece: int = 1 << 20,
    transitions: Mapping[str, NDArray[np.float64]] | None = None,
) -> Statistics:
    """The statistics of a trace that comes in pieces, no more than a few of which are in memory at a time.

    A piece is a trace or a function that reads it (where another process is to read it, one that can be pickled).
    ``batches_per_piece`` is at least the batches of any piece; where all but the last have as many, the result is that
    of observing the whole. ``transitions`` are those that the trace holds itself, by scenario. With an ``executor``
    pieces are counted in parallel. Raises ``PlacementError`` where there is no piece or pieces are of different models.
    """
    whole: Statistics | None = None
    numbered = ((piece, number * batches_per_piece) for number, piece in enumerate(pieces))
    work = partial(_observe_piece, limits or Limits())
    for statistics in map(work, numbered) if executor is None else _windowed(executor, work, numbered):
        whole = statistics if whole is None else whole.merge(statistics)
    if whole is None:
        raise PlacementError("no piece of a trace was given; expected at least one file or batch")
    return whole.with_transitions(transitions or {})


def _windowed(
    executor: Executor, function: Callable[[Task], Statistics], tasks: Iterable[Task]
) -> Iterator[Statistics]:
    """As ``Executor.map``, but only a few tasks are handed over at a time: results that wait take memory."""
    waiting: deque[Future[Statistics]] = deque()
    most = 2 * max(1, int(getattr(executor, "_max_workers", 1)))
    try:
        for task in tasks:
            waiting.append(executor.submit(function, task))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _observe_piece(limits: Limits, numbered: tuple[Trace | Callable[[], Trace], int]) -> Statistics:
    piece, first = numbered
    return observe(piece if isinstance(piece, Trace) else piece(), limits, first)


def coactivation(experts: Experts, num_experts: int) -> Counts:
    """Tokens that chose both experts, ``[layers, experts, experts]``, from choices ``[layers, tokens, top_k]``."""
    layers, _, top_k = experts.shape
    together = np.zeros((layers, num_experts, num_experts), dtype=np.int64)
    for layer in range(layers):
        for first in range(top_k):
            for second in range(first + 1, top_k):
                together[layer] += _pairs(experts[layer, :, first], experts[layer, :, second], num_experts)
    return together + together.transpose(0, 2, 1)


def transitions(experts: Experts, num_experts: int) -> NDArray[np.float64]:
    """Pairs of choices in a layer and in the next, ``[layers - 1, experts, experts]``."""
    layers, _, top_k = experts.shape
    moves = np.zeros((max(layers - 1, 0), num_experts, num_experts))
    for layer in range(layers - 1):
        for first in range(top_k):
            for second in range(top_k):
                moves[layer] += _pairs(experts[layer, :, first], experts[layer + 1, :, second], num_experts)
    return moves


def _pairs(first: NDArray[np.int32], second: NDArray[np.int32], num_experts: int) -> Counts:
    both = (first >= 0) & (second >= 0)
    index = first[both].astype(np.int64) * num_experts + second[both]
    return np.bincount(index, minlength=num_experts * num_experts).reshape(num_experts, num_experts)


def _observe_batch(batch: Batch, trace: Trace, limits: Limits, number: int) -> Routing:
    kept = Sample(_keys(number, 1), batch.counts[None].astype(np.int32 if batch.counts.max() < 2**31 else np.int64))
    sample = sources = together = moves = None
    if batch.experts is not None:
        tokens = batch.experts.shape[1]
        keys = _keys(number, tokens)
        order = np.argsort(keys, kind="stable")[: limits.tokens]
        sample = Sample(keys[order], batch.experts.transpose(1, 0, 2)[order])
        known = batch.source_rank if batch.source_rank is not None else np.full(tokens, -1, np.int32)
        sources = Sample(keys[order], known[order])
        together = coactivation(batch.experts, trace.num_experts) if limits.coactivation else None
        moves = transitions(batch.experts, trace.num_experts) if limits.transitions else None
    tokens = batch.num_tokens or int(batch.counts.sum(1).max()) // trace.top_k
    return Routing(1, tokens, batch.counts.astype(np.int64), kept, sample, sources, together, moves)


def _keys(batch: int, tokens: int) -> NDArray[np.uint64]:
    """Well mixed 64-bit keys of a batch's tokens (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = np.arange(tokens, dtype=np.uint64) + np.uint64(batch % (1 << 40)) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
