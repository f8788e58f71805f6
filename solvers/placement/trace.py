"""A routing trace in memory: which experts each token of each batch chose, or how often each expert was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError

#: What a batch does: fill the cache from a prompt, or add one token a sequence; "mixed" where the source does not say.
PHASES = ("prefill", "decode", "mixed")

Counts = NDArray[np.int64]
Experts = NDArray[np.int32]


def count_experts(experts: Experts, num_experts: int) -> Counts:
    """Tokens per expert, ``[layers, experts]``, from choices ``[layers, tokens, top_k]``; -1 is no choice."""
    layers = experts.shape[0]
    flat = experts.reshape(layers, -1).astype(np.int64)
    shifted = np.where(flat >= 0, flat + np.arange(layers)[:, None] * num_experts, layers * num_experts)
    counted = np.bincount(shifted.ravel(), minlength=layers * num_experts + 1)[:-1]
    return counted.reshape(layers, num_experts).astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    ``counts`` is ``[layers, experts]``; ``experts``, where known, is ``[layers, tokens, top_k]`` with -1 for no choice;
    ``source_rank``, where known, is ``[tokens]``: the rank that holds each token.
    """

    counts: Counts
    experts: Experts | None = None
    source_rank: NDArray[np.int32] | None = None
    phase: str = "mixed"
    #: Domain, tenant or workload that the batch belongs to.
    scenario: str = "all"

    @classmethod
    def of_tokens(
        cls,
        experts: NDArray[np.integer],
        num_experts: int,
        source_rank: NDArray[np.integer] | None = None,
        phase: str = "mixed",
        scenario: str = "all",
    ) -> Batch:
        """A batch from the choices of its tokens, ``[layers, tokens, top_k]``."""
        if experts.ndim != 3:
            raise PlacementError(f"choices of shape {experts.shape} were given; expected [layers, tokens, top_k]")
        if experts.size and (experts.max() >= num_experts or experts.min() < -1):
            raise PlacementError(
                f"a token's choice of expert {int(experts.max())} (lowest {int(experts.min())}) was given for a model "
                f"of {num_experts} experts; expected 0 to {num_experts - 1}, or -1 for none; check the trace's model"
            )
        chosen = np.ascontiguousarray(experts, dtype=np.int32)
        ordered = np.sort(chosen, axis=-1)
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise PlacementError("a token that chose one expert twice was given; expected distinct experts per token")
        source = None if source_rank is None else np.asarray(source_rank, dtype=np.int32)
        if source is not None and source.shape != chosen.shape[1:2]:
            raise PlacementError(f"source ranks of shape {source.shape} were given for {chosen.shape[1]} tokens")
        return cls(count_experts(chosen, num_experts), chosen, source, phase, scenario)

    @property
    def num_tokens(self) -> int | None:
        """How many tokens the batch has, where the trace holds them."""
        return None if self.experts is None else int(self.experts.shape[1])


@dataclass(frozen=True)
class Trace:
    """Batches of one model. ``layer_ids`` are true layer positions; ``num_hidden_layers`` counts dense layers too."""

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    batches: tuple[Batch, ...]
    num_hidden_layers: int = 0
    model_name: str = ""
    #: Pairs of expert counts between recorded layers, ``[layers - 1, experts, experts]`` per scenario, where the source
    #: has no tokens but does have these.
    transitions: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.batches:
            raise PlacementError("a trace without batches was given; expected at least one; record the model's routing")
        if self.num_hidden_layers == 0:
            object.__setattr__(self, "num_hidden_layers", self.layer_ids[-1] + 1 if self.layer_ids else 0)
        for number, batch in enumerate(self.batches):
            _check_batch(batch, number, self)

    @property
    def num_layers(self) -> int:
        """How many expert layers were recorded."""
        return len(self.layer_ids)

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Names of the scenarios, in the order of their first batch."""
        return tuple(dict.fromkeys(batch.scenario for batch in self.batches))

    @property
    def has_tokens(self) -> bool:
        """Whether every batch holds its tokens' choices, not only counts."""
        return all(batch.experts is not None for batch in self.batches)

    def select(self, scenarios: Sequence[str] | None = None, phases: Sequence[str] | None = None) -> Trace:
        """The batches of these scenarios and phases. Raises ``PlacementError`` when none is left."""
        kept = tuple(
            batch
            for batch in self.batches
            if (scenarios is None or batch.scenario in scenarios) and (phases is None or batch.phase in phases)
        )
        if not kept:
            raise PlacementError(
                f"scenarios {scenarios} and phases {phases} were asked for; the trace has "
                f"{', '.join(self.scenarios)}; ask for one of these"
            )
        names = {batch.scenario for batch in kept}
        return replace(self, batches=kept, transitions={k: v for k, v in self.transitions.items() if k in names})

    def split(self, fraction: float) -> tuple[Trace, Trace]:
        """The first ``fraction`` of the batches to plan on, the rest to score on; each scenario is split alike."""
        first, second = split_numbers([batch.scenario for batch in self.batches], fraction)
        parts = [tuple(self.batches[number] for number in numbers) for numbers in (first, second)]
        return replace(self, batches=parts[0]), replace(self, batches=parts[1])

    def chunks(self, size: int) -> Iterator[Trace]:
        """The trace in pieces of ``size`` batches, without the transitions that it holds itself."""
        for start in range(0, len(self.batches), size):
            yield replace(self, batches=self.batches[start : start + size], transitions={})


def split_numbers(scenarios: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Numbers of the batches to plan on, the first ``fraction`` of each scenario's, and of the rest.

    ``scenarios`` is each batch's. Raises ``PlacementError`` where a scenario has one batch.
    """
    if not 0.0 < fraction < 1.0:
        raise PlacementError(f"a fraction of {fraction} was given; expected one between 0 and 1")
    numbers: dict[str, list[int]] = {}
    for number, scenario in enumerate(scenarios):
        numbers.setdefault(scenario, []).append(number)
    first: list[int] = []
    second: list[int] = []
    for scenario, own in numbers.items():
        if len(own) < 2:
            raise PlacementError(
                f"scenario {scenario!r} has one batch; expected at least two to hold some out; "
                "record more batches or score on another trace"
            )
        cut = min(max(1, round(len(own) * fraction)), len(own) - 1)
        first += own[:cut]
        second += own[cut:]
    return first, second


def _check_batch(batch: Batch, number: int, trace: Trace) -> None:
    expected = (trace.num_layers, trace.num_experts)
    if batch.counts.shape != expected:
        raise PlacementError(
            f"batch {number} has counts of shape {batch.counts.shape}; expected {expected} (layers, experts): "
            "a layer is missing or the trace is of another model"
        )
    if not np.isfinite(batch.counts).all():
        raise PlacementError(f"batch {number} has counts that are not numbers; expected whole numbers of tokens")
    if (batch.counts < 0).any():
        layer = int(np.argwhere(batch.counts < 0)[0][0])
        raise PlacementError(f"batch {number} has a negative count in layer {trace.layer_ids[layer]}; expected >= 0")
    if batch.phase not in PHASES:
        raise PlacementError(f"batch {number} is of phase {batch.phase!r}; expected one of {', '.join(PHASES)}")


def whole_counts(values: NDArray[np.generic], where: str) -> Counts:
    """Counts as whole numbers. Raises ``PlacementError`` on NaN, infinite, negative or non-numeric entries."""
    if values.dtype.kind not in "iuf":
        raise PlacementError(f"{where} holds counts of type {values.dtype}; expected numbers of tokens")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise PlacementError(
            f"{where} holds counts that are not finite; expected whole numbers of tokens; record again"
        )
    if values.size and values.min() < 0:
        raise PlacementError(f"{where} holds negative counts; expected numbers of tokens >= 0; record again")
    return (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int64)
