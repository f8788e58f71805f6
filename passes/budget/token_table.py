"""From a few measured cuts to the tables that a token schedule is made from.

A cut removes tokens behind one layer only. Its loss is what that removal loses; its time tells, beside the cut one
layer further on, what the layer between saves. Layers between measured ones are interpolated, and so are numbers
of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.passes.budget.token_sites import TokenSites
from regraft.solvers.schedule.tokens import TokenTable

Array = NDArray[np.float64]
_LEAST = 1e-12  # losses below this are none


@dataclass(frozen=True)
class Cut:
    """``removed`` tokens behind ``layer``, and nothing else."""

    layer: int
    removed: int


def table(
    sites: TokenSites,
    method: str,
    losses: Mapping[Cut, float],
    seconds: Mapping[Cut, float],
    exact_seconds: float,
) -> TokenTable:
    """The table of a program and a method from the losses and times of cuts. Layers of which no cut was measured allow
    no removal where their losses are concerned, and are interpolated where their times are."""
    removals = tuple(number for number in sites.removals)
    loss = np.full((sites.layers, sites.tokens + 1, len(removals)), np.inf)
    loss[:, :, 0] = 0.0
    for layer, legal in enumerate(sites.legal[method]):
        known = {cut.removed: value for cut, value in losses.items() if cut.layer == layer and np.isfinite(value)}
        if not legal or not known:
            continue
        of = _power_law(known)
        for left in range(1, sites.tokens + 1):
            most = sites.most(method, left)
            for choice, removed in enumerate(removals):
                if 0 < removed <= most:  # of fewer tokens the same number is a larger part
                    loss[layer, left, choice] = of(removed * sites.tokens / left)
    saved, overhead = _savings(sites, seconds, exact_seconds)
    per_layer = exact_seconds / max(sites.layers, 1)
    own = np.maximum(per_layer - (saved - np.vstack([saved[1:], np.zeros(sites.tokens + 1)])), 0.0)
    return TokenTable(removals, own, overhead, loss, exact_seconds - per_layer * sites.layers)


def _power_law(known: Mapping[int, float]) -> Callable[[float], float]:
    """Loss as a function of the tokens removed: straight between measured points in logarithms, and beyond them."""
    numbers = np.log(sorted(known))
    values = np.log([max(known[number], _LEAST) for number in sorted(known)])
    values = np.maximum.accumulate(values)  # more tokens do not lose less, whatever few samples say

    def loss(removed: float) -> float:
        at = np.log(removed)
        if len(numbers) == 1:
            return float(np.exp(values[0] + (at - numbers[0])))
        place = int(np.clip(np.searchsorted(numbers, at), 1, len(numbers) - 1))
        slope = (values[place] - values[place - 1]) / (numbers[place] - numbers[place - 1])
        return float(np.exp(values[place - 1] + slope * (at - numbers[place - 1])))

    return loss


def _savings(sites: TokenSites, seconds: Mapping[Cut, float], exact: float) -> tuple[Array, Array]:
    """``saved[layer, left]``: what all layers from ``layer`` on save with ``left`` tokens, ``[layers, tokens + 1]``;
    and what a reduction costs by itself, ``[layers]``."""
    counts = sites.tokens - np.arange(sites.tokens + 1.0)
    rows: dict[int, Array] = {}
    costs: dict[int, float] = {}
    for layer in sorted({cut.layer for cut in seconds}):
        points = sorted((cut.removed, exact - value) for cut, value in seconds.items() if cut.layer == layer)
        slope, cost = _line(points)
        costs[layer] = cost
        rows[layer] = _through([(0, 0.0), *((removed, saved + cost) for removed, saved in points)], slope, counts)
    layers = np.arange(sites.layers)
    known = sorted(rows)
    if not known:
        return np.zeros((sites.layers, sites.tokens + 1)), np.zeros(sites.layers)
    ends = [*known, sites.layers] if known[-1] < sites.layers else known
    held = np.stack([*(rows[layer] for layer in known), np.zeros(sites.tokens + 1)][: len(ends)])
    saved = np.stack([np.interp(layers, ends, held[:, left]) for left in range(sites.tokens + 1)], axis=1)
    return saved, np.interp(layers, known, [costs[layer] for layer in known])


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds saved by each token removed, and the cost of a reduction by itself: the least squares line."""
    removed, saved = np.array([p[0] for p in points], float), np.array([p[1] for p in points])
    if len(points) < 2:
        return max(float(saved[0] / removed[0]), 0.0), 0.0
    slope, start = np.polyfit(removed, saved, 1)
    return max(float(slope), 0.0), max(-float(start), 0.0)


def _through(points: list[tuple[int, float]], slope: float, counts: Array) -> Array:
    """What is saved at each of ``counts`` removed: measured points joined, never less for more, and beyond them on."""
    removed = np.array([p[0] for p in points], float)
    saved = np.maximum.accumulate([p[1] for p in points])
    inside: Array = np.interp(counts, removed, saved)
    beyond: Array = slope * np.maximum(counts - removed[-1], 0.0)
    return np.add(inside, beyond)
