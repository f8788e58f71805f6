"""From a few measured cuts to the tables that a token schedule is made from.

A cut removes tokens behind one layer only; its loss is what that removal loses. Times are fitted: a token that goes
behind a layer saves time in proportion to the work that it saves, and each reduction costs the same. A single
measurement is noisy; all of them together, that of an even schedule among them, are less so, and two numbers are all
that is asked of them.
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
    seconds: Mapping[tuple[int, ...], float],
    work: Mapping[int, float],
    exact_seconds: float,
) -> TokenTable:
    """The table of a program and a method from the losses of cuts and the times of schedules. ``work``: the part of the
    exact model's work that a token saves which goes behind a layer. A layer of which no cut was measured has the losses
    of the nearest one, and what a token saves there lies between those around it."""
    removals = sites.removals
    loss = np.full((sites.layers, sites.tokens + 1, len(removals)), np.inf)
    loss[:, :, 0] = 0.0
    finite = {cut: value for cut, value in losses.items() if np.isfinite(value)}
    measured = sorted({cut.layer for cut in finite})
    for layer, legal in enumerate(sites.legal[method]):
        if not legal or not measured:
            continue
        nearest = measured[int(np.abs(np.array(measured) - layer).argmin())]
        of = _power_law({cut.removed: value for cut, value in finite.items() if cut.layer == nearest})
        for left in range(1, sites.tokens + 1):
            most = sites.most(method, left)
            for choice, removed in enumerate(removals):
                if 0 < removed <= most:  # of fewer tokens the same number is a larger part
                    loss[layer, left, choice] = of(removed * sites.tokens / left)
    saved, cost = _fitted(seconds, _of_layers(work, sites.layers), exact_seconds)
    per_layer = exact_seconds / sites.layers
    behind = saved - np.append(saved[1:], 0.0)  # what each token saves up to the next reduction
    own = per_layer - behind[:, None] * (sites.tokens - np.arange(sites.tokens + 1.0))
    return TokenTable(removals, np.maximum(own, 0.0), np.full(sites.layers, cost), loss, 0.0)


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


def _of_layers(work: Mapping[int, float], layers: int) -> Array:
    """The part of the work that a token saves which goes behind each layer, ``[layers]``."""
    known = sorted(work)
    if known[-1] == layers - 1:
        return np.interp(range(layers), known, [work[layer] for layer in known])
    values = [*(work[layer] for layer in known), 0.0]  # behind the last layer there is nothing to save
    return np.interp(range(layers), [*known, layers], values)


def _fitted(seconds: Mapping[tuple[int, ...], float], work: Array, exact: float) -> tuple[Array, float]:
    """The seconds that a token saves which goes behind each layer, ``[layers]``, and what a reduction costs: least
    squares over all schedules that were timed, neither of them negative. That time follows work counts as one of the
    measurements."""
    schedules = np.array(list(seconds), float)
    expected = exact * (schedules @ work)
    usual = float(expected.mean())
    rows = np.column_stack([np.append(expected, usual), np.append(-(schedules > 0).sum(1).astype(float), 0.0)])
    values = np.append(exact - np.array(list(seconds.values())), usual)
    scale, cost = _not_negative(rows, values)
    return scale * exact * work, float(cost)


def _not_negative(rows: Array, values: Array) -> Array:
    """The least squares solution ``[2]`` without negative parts: of every choice of parts that are zero the best."""
    best, least = np.zeros(2), float((values**2).sum())
    for part in ([0], [1], [0, 1]):
        found = np.zeros(2)
        found[part] = np.linalg.lstsq(rows[:, part], values, rcond=None)[0]
        error = float(((rows @ found - values) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = found, error
    return best
