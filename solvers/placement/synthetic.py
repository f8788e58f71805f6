"""Traces with a planted structure, whose best placement is known; and traces of counts alone.

Experts of a layer fall into hidden groups of equal size, and within a group into hidden parts that draw equally many
tokens. A token has a topic, one group in each layer, and takes its experts from there. So a placement that keeps groups
on nodes (or ranks) and deals the parts to ranks is balanced and sends least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.trace import Batch, Trace


@dataclass(frozen=True)
class Planted:
    """A trace and what was hidden in it: ``order`` ``[layers, experts]`` lists each layer's experts group by group,
    part by part; ``follows`` ``[layers - 1, groups]`` is the group of the next layer that a group's tokens go to.
    """

    trace: Trace
    order: NDArray[np.int64]
    follows: NDArray[np.int64]
    num_groups: int
    num_parts: int

    def plan(self, num_ranks: int | None = None) -> Plan:
        """The best placement: ranks hold whole parts, a group's ranks follow each other, chains of groups stay put.

        ``num_ranks`` must divide the number of parts of all groups (the default) or be a multiple of no part.
        """
        total = self.num_groups * self.num_parts
        ranks = total if num_ranks is None else num_ranks
        layers, experts = self.order.shape
        if total % ranks:
            raise PlacementError(f"{ranks} ranks were given for {total} parts; expected a number that divides them")
        place = np.arange(self.num_groups)
        tables = []
        for layer in range(layers):
            if layer:
                after = np.empty_like(place)
                after[self.follows[layer - 1]] = place
                place = after
            blocks = self.order[layer].reshape(self.num_groups, -1)
            tables.append(blocks[np.argsort(place)].reshape(ranks, experts // ranks))
        trace = self.trace
        return Plan(experts, trace.layer_ids, trace.num_hidden_layers, tuple(tables), trace.model_name, "planted")


def planted_trace(
    layers: int,
    experts: int,
    top_k: int,
    groups: int,
    parts: int = 1,
    batches: int = 8,
    tokens: int = 1024,
    focus: float = 1.0,
    affinity: float = 0.9,
    skew: float = 0.5,
    seed: int = 0,
    scenario: str = "all",
    phase: str = "prefill",
) -> Planted:
    """Draw a trace with ``groups`` hidden groups of ``parts`` parts in each layer.

    A choice falls outside the token's group with a chance that ``1 - focus`` weighs; in the next layer the token's
    topic follows its group with chance ``affinity`` and is exchanged with another token's otherwise, so that every
    batch has every topic equally often. Within a part, popularity falls with
    rank as a power law of exponent ``skew``. Raises ``PlacementError`` for sizes that do not divide.
    """
    if experts % (groups * parts) or experts // groups < top_k:
        raise PlacementError(
            f"{experts} experts were given for {groups} groups of {parts} parts and top-{top_k}; "
            "expected parts of equal size and groups of at least top_k experts"
        )
    generator = np.random.default_rng(seed)
    order = np.stack([generator.permutation(experts) for _ in range(layers)])
    follows = np.stack([generator.permutation(groups) for _ in range(layers - 1)]) if layers > 1 else _none(groups)
    popularity = _popularity(experts, groups * parts, skew)
    made = tuple(
        Batch.of_tokens(
            _batch(generator, order, follows, popularity, (tokens, top_k, groups), focus, affinity),
            experts,
            phase=phase,
            scenario=scenario,
        )
        for _ in range(batches)
    )
    trace = Trace(experts, top_k, tuple(range(layers)), made, layers, "planted")
    return Planted(trace, order, follows, groups, parts)


def power_law_trace(
    layers: int,
    experts: int,
    top_k: int,
    batches: int = 32,
    tokens: int = 4096,
    alpha: float = 1.01,
    peak: float | None = None,
    drift: float = 0.1,
    seed: int = 0,
    scenario: str = "all",
    phase: str = "mixed",
) -> Trace:
    """Counts alone: popularity uniform in a bounded power law of exponent ``alpha``, drawn for each layer.

    Each batch multiplies popularity by log-normal noise of deviation ``drift`` and draws its counts. ``peak`` bounds
    the hottest expert's share, as a multiple of the mean. No expert is chosen twice by one token.
    """
    generator = np.random.default_rng(seed)
    popularity = _bounded_power_law(generator, layers, experts, alpha)
    if peak is not None:
        popularity = np.minimum(popularity, peak * popularity.mean(1, keepdims=True))
    made = []
    for _ in range(batches):
        noisy = popularity * np.exp(drift * generator.standard_normal(popularity.shape))
        counts = np.stack([_draw(generator, row, top_k, tokens) for row in noisy])
        made.append(Batch(counts, phase=phase, scenario=scenario))
    return Trace(experts, top_k, tuple(range(layers)), tuple(made), layers, "power law")


def _none(groups: int) -> NDArray[np.int64]:
    return np.zeros((0, groups), dtype=np.int64)


def _popularity(experts: int, parts: int, skew: float) -> NDArray[np.float64]:
    """Every part has the same popularities."""
    size = experts // parts
    part = np.arange(1, size + 1, dtype=np.float64) ** -skew
    return np.tile(part / part.sum(), parts)


def _batch(
    generator: np.random.Generator,
    order: NDArray[np.int64],
    follows: NDArray[np.int64],
    popularity: NDArray[np.float64],
    sizes: tuple[int, int, int],
    focus: float,
    affinity: float,
) -> NDArray[np.int32]:
    """Choices ``[layers, tokens, top_k]``: the top of popularity times exponential noise (Gumbel's trick)."""
    tokens, top_k, groups = sizes
    layers, experts = order.shape
    group_of_place = np.repeat(np.arange(groups), experts // groups)
    chosen = np.empty((layers, tokens, top_k), dtype=np.int32)
    topic = generator.permutation(np.arange(tokens) % groups)
    for layer in range(layers):
        if layer:
            topic = follows[layer - 1][topic]
            leaves = np.flatnonzero(generator.random(tokens) >= affinity)
            topic[leaves] = topic[generator.permutation(leaves)]
        inside = group_of_place[None, :] == topic[:, None]
        weight = popularity * np.where(inside, 1.0, max(1.0 - focus, 0.0) / max(groups - 1, 1))
        with np.errstate(divide="ignore"):
            score = np.log(weight) + generator.gumbel(size=(tokens, experts))
        top = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
        chosen[layer] = order[layer][top]
    return chosen


def _bounded_power_law(generator: np.random.Generator, layers: int, experts: int, alpha: float) -> NDArray[np.float64]:
    """Inverse transform of a density falling as x to the -alpha between 1 and the number of experts."""
    uniform, top = generator.random((layers, experts)), float(experts)
    if abs(alpha - 1.0) < 1e-9:
        drawn = top**uniform
    else:
        power = 1.0 - alpha
        drawn = (1.0 + uniform * (top**power - 1.0)) ** (1.0 / power)
    return np.asarray(drawn / drawn.sum(1, keepdims=True))


def _draw(generator: np.random.Generator, weight: NDArray[np.float64], top_k: int, tokens: int) -> NDArray[np.int64]:
    """Tokens per expert, none more than all tokens: what is too much goes to the others."""
    share = weight / weight.sum()
    counts = generator.multinomial(tokens * top_k, share)
    while (counts > tokens).any():
        excess = int((counts - tokens).clip(min=0).sum())
        counts = np.minimum(counts, tokens)
        room = np.where(counts < tokens, share, 0.0)
        counts = counts + generator.multinomial(excess, room / room.sum())
    return np.asarray(counts, dtype=np.int64)
