"""What the search asks of whoever can build and run models; and the clock that it works by."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regraft.passes.budget.candidate import Composition
from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.estimate import Estimate

Array = NDArray[np.float64]


class Trials(Protocol):
    """Builds a model with some rewrites, runs it on calibration data, times it beside the exact one."""

    @property
    def exact_seconds(self) -> float:
        """The time of one call of the exact model, measured once."""
        ...

    @property
    def batches(self) -> int:
        """Number of batches to calibrate with, those held out not counted."""
        ...

    def losses(self, composition: Composition, batches: int | None = None) -> Array:
        """The loss of each calibration sample, or of those of the first few batches; one infinite loss where the
        rewrites cannot be made."""
        ...

    def held_out(self, composition: Composition) -> Array:
        """The same on the batches that are held out, by the model as it will be used."""
        ...

    def work(self, composition: Composition) -> float:
        """The model's modelled work over that of the exact one; NaN where the rewrites cannot be made."""
        ...

    def ratio(self, composition: Composition, thorough: bool = False) -> float:
        """The model's time over that of the exact one, calls in turn; NaN where the rewrites cannot be made."""
        ...


@dataclass
class Tried:
    """One composition: what was predicted of it, and what was measured: ``losses`` of each calibration sample, and what
    they come to. Times are in seconds a call."""

    composition: Composition
    predicted_loss: float
    predicted_seconds: float
    loss: Estimate | None = None
    seconds: float | None = None
    held_out: Estimate | None = None
    losses: Array = field(default_factory=lambda: np.empty(0), compare=False, repr=False)

    @property
    def name(self) -> str:
        """The candidates by name; "exact" where there are none."""
        return "; ".join(candidate.name for candidate in self.composition) or "exact"


@dataclass(frozen=True)
class Clock:
    """Counts from when it was made."""

    seconds: float
    started: float

    @staticmethod
    def after(seconds: float) -> Clock:
        """A clock that starts now."""
        return Clock(seconds, time.perf_counter())

    @property
    def spent(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.started

    def part(self, share: float) -> bool:
        """Whether less than this part of the time is spent."""
        return self.spent < share * self.seconds


def checked(losses: Array, limit: float) -> Array:
    """Losses as they are. Raises ``BudgetError`` where their mean is as far below 0 as ``limit`` is above: they are
    likenesses, or have their sign turned, and everything would keep the limit."""
    if mean(losses) < -limit:
        raise BudgetError(
            f"the metric gives a loss of {mean(losses):.2g}; a loss must be 0 for equal outputs, and more for others"
        )
    return losses


def mean(losses: Array) -> float:
    """The mean loss; infinite for none."""
    return float(losses.mean()) if losses.size else math.inf
