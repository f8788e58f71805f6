"""Batches without their sampling noise: what differs from batch to batch and would differ again in others.

Counts of a batch scatter around its true shares as tokens are drawn (Poisson). Fitted to a few batches, a plan levels
that noise, which no other batch has. So each batch is drawn towards the mean of its scenario by the part of the
variance that noise explains (James and Stein 1961, one factor a layer), and further where there are few batches.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.workload import Scenario, Workload

Array = NDArray[np.float64]
#: Part of the scatter that is always kept: how much ranks scatter depends a little on who lies together.
_LEAST = 0.25
#: Number of batches at which half of what noise does not explain is believed to come again.
_FEW = 32


def denoised(workload: Workload) -> Workload:
    """The workload with each scenario's batches drawn towards their mean; scenarios of one batch stay as they are."""
    return replace(workload, scenarios=tuple(_denoised(scenario) for scenario in workload.scenarios))


def _denoised(scenario: Scenario) -> Scenario:
    counts = scenario.counts
    if len(counts) < 2:
        return scenario
    total = counts.sum(2, keepdims=True)
    share = counts.sum(0, keepdims=True) / np.maximum(total.sum(0, keepdims=True), 1e-12)
    expected = total * share
    trusted = len(counts) / (len(counts) + _FEW)
    kept = np.maximum(np.sqrt(systematic_part(counts, expected)) * trusted, _LEAST)
    return replace(scenario, counts=expected + kept[None, :, None] * (counts - expected))


def systematic_part(counts: Array, expected: Array) -> Array:
    """Part of the variance around ``expected`` that is not sampling noise, ``[layers]``, from 0 to 1.

    ``counts`` and ``expected`` are ``[batches, layers, experts]``. Noise of a count has the count as its variance.
    """
    batches = len(counts)
    scatter = ((counts - expected) ** 2).sum((0, 2)) * batches / (batches - 1)
    noise = expected.sum((0, 2))
    part: Array = np.clip(1.0 - noise / np.maximum(scatter, 1e-12), 0.0, 1.0)
    return part
