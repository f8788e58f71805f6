"""What a plan is judged on: per scenario the counts of its batches and, where recorded, its tokens' choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.statistics import Limits, Routing, Statistics, observe
from regraft.solvers.placement.trace import Experts, Trace

#: What makes a scenario: a domain or tenant, a phase, both, or everything together.
GROUPINGS = ("scenario", "phase", "both", "all")


@dataclass(frozen=True)
class Scenario:
    """One workload.

    ``counts`` ``[batches, layers, experts]`` and ``tokens`` ``[batches, layers]`` are tokens. ``experts``
    ``[tokens, layers, top_k]`` are sampled tokens' choices, ``sources`` ``[tokens]`` their source ranks;
    ``transitions`` ``[layers - 1, experts, experts]`` are copies per token. Each is None where not recorded.
    """

    name: str
    phase: str
    counts: NDArray[np.float64]
    tokens: NDArray[np.float64]
    experts: Experts | None = None
    sources: NDArray[np.int32] | None = None
    transitions: NDArray[np.float64] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Workload:
    """Scenarios of one model."""

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    scenarios: tuple[Scenario, ...]
    num_hidden_layers: int = 0

    def __post_init__(self) -> None:
        if not self.scenarios:
            raise PlacementError("a workload without scenarios was given; expected at least one")
        for scenario in self.scenarios:
            if not (np.isfinite(scenario.weight) and scenario.weight > 0):
                raise PlacementError(f"scenario {scenario.name!r} weighs {scenario.weight}; expected a positive number")
            empty = np.flatnonzero(scenario.counts.sum((0, 2)) == 0)
            if empty.size:
                raise PlacementError(
                    f"scenario {scenario.name!r} has no tokens in layer {self.layer_ids[int(empty[0])]}; "
                    "expected some in every expert layer; record again or leave the layer out"
                )

    @property
    def num_layers(self) -> int:
        """Expert layers."""
        return len(self.layer_ids)

    @property
    def mean_counts(self) -> NDArray[np.float64]:
        """Tokens per expert of a mean batch, ``[layers, experts]``, each scenario scaled to the same total first."""
        shares = []
        for scenario in self.scenarios:
            total = scenario.counts.mean(0)
            shares.append(scenario.weight * total / total.sum(1, keepdims=True))
        scale = np.mean([scenario.counts.mean(0).sum(1) for scenario in self.scenarios], axis=0)
        mean: NDArray[np.float64] = np.sum(shares, axis=0) / sum(s.weight for s in self.scenarios) * scale[:, None]
        return mean

    def thinned(self, batches: int, tokens: int) -> Workload:
        """At most this many batches and tokens in each scenario, evenly chosen: a smaller problem to search on."""
        return replace(self, scenarios=tuple(_thin(scenario, batches, tokens) for scenario in self.scenarios))


def workload_of(
    source: Statistics | Trace,
    by: str = "scenario",
    weights: Mapping[str, float] | None = None,
    tokens_per_batch: float | None = None,
    limits: Limits | None = None,
) -> Workload:
    """The workload of a trace or of its statistics.

    ``weights`` name scenarios that weigh other than 1. ``tokens_per_batch`` scales every batch to as many tokens as
    will be served at a time, where the recording's batches were of another size. Raises ``PlacementError``.
    """
    if by not in GROUPINGS:
        raise PlacementError(f"scenarios by {by!r} were asked for; expected one of {', '.join(GROUPINGS)}")
    statistics = source if isinstance(source, Statistics) else observe(source, limits)
    grouped: dict[str, list[tuple[str, Routing]]] = {}
    for (scenario, phase), routing in statistics.routing.items():
        name = {"scenario": scenario, "phase": phase, "both": f"{scenario}/{phase}", "all": "all"}[by]
        grouped.setdefault(name, []).append((phase, routing))
    unknown = set(weights or ()) - set(grouped)
    if unknown:
        raise PlacementError(
            f"weights for scenarios {sorted(unknown)} were given; the trace has {', '.join(sorted(grouped))}"
        )
    scenarios = tuple(
        _scenario(name, parts, statistics, (weights or {}).get(name, 1.0), tokens_per_batch)
        for name, parts in grouped.items()
    )
    return Workload(
        statistics.num_experts, statistics.top_k, statistics.layer_ids, scenarios, statistics.num_hidden_layers
    )


def merged(workloads: Iterable[Workload]) -> Workload:
    """Scenarios of several traces of one model together. Raises ``PlacementError`` for different models."""
    found = list(workloads)
    first = found[0]
    for other in found[1:]:
        if (other.num_experts, other.layer_ids, other.top_k) != (first.num_experts, first.layer_ids, first.top_k):
            raise PlacementError("traces of different models were given together; expected one model")
    return replace(first, scenarios=tuple(scenario for workload in found for scenario in workload.scenarios))


def _scenario(
    name: str, parts: list[tuple[str, Routing]], statistics: Statistics, weight: float, tokens_per_batch: float | None
) -> Scenario:
    phases = {phase for phase, _ in parts}
    routing = parts[0][1]
    for _, other in parts[1:]:
        routing = routing.merge(other, statistics.limits)
    counts = routing.kept.rows.astype(np.float64)
    tokens = counts.sum(2) / statistics.top_k
    if tokens_per_batch is not None:
        if not tokens_per_batch > 0:
            raise PlacementError(f"{tokens_per_batch} tokens per batch were given; expected a positive number")
        scale = tokens_per_batch / np.maximum(tokens, 1e-9)
        counts, tokens = counts * scale[:, :, None], np.where(tokens > 0, tokens_per_batch, 0.0)
    moves = None
    if routing.transitions is not None:
        moves = routing.transitions * (statistics.top_k / np.maximum(routing.transitions.sum((1, 2), keepdims=True), 1))
    return Scenario(
        name,
        next(iter(phases)) if len(phases) == 1 else "mixed",
        counts,
        tokens,
        None if routing.sample is None else routing.sample.rows.astype(np.int32),
        _known_sources(routing),
        moves,
        weight,
    )


def _known_sources(routing: Routing) -> NDArray[np.int32] | None:
    if routing.sources is None:
        return None
    sources = routing.sources.rows.astype(np.int32)
    return None if (sources < 0).any() else sources


def _thin(scenario: Scenario, batches: int, tokens: int) -> Scenario:
    chosen = np.unique(np.linspace(0, len(scenario.counts) - 1, min(batches, len(scenario.counts))).round().astype(int))
    cut = slice(0, tokens)
    return replace(
        scenario,
        counts=scenario.counts[chosen],
        tokens=scenario.tokens[chosen],
        experts=None if scenario.experts is None else scenario.experts[cut],
        sources=None if scenario.sources is None else scenario.sources[cut],
    )
