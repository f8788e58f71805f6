"""The budget itself: how much a model may lose, by which metric, and how long the search for where may take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.metric import METRICS, RATES, MetricFunction, metric_name


@dataclass(frozen=True)
class Budget:
    """How much accuracy a compiled model may lose against the original.

    ``metric``: "kl" (nats), "top1" (share of samples whose largest output changes), "cosine" (one minus it),
    "relative_l2", or a function of (output, reference), both as the model returns them, that gives a number or one for
    each sample, 0 for equal outputs. ``limit``: the largest mean loss; 0 leaves the exact model. ``output`` names the
    output that is compared ("logits", "0"); without it all are, and the worst counts. ``confidence``: that the mean of
    the data which the calibration was drawn from keeps the limit. ``seconds``: how long the search may take, beside
    compiling. ``seed`` says which batches are held out. ``families`` are the kinds of rewrites that may be made
    ("tokens", "bf16", …), None for all. Raises ``BudgetError`` for anything else.
    """

    metric: str | MetricFunction
    limit: float
    output: str | None = None
    confidence: float = 0.99
    seconds: float = 120.0
    seed: int = 0
    families: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.metric, str) and self.metric not in METRICS:
            known = ", ".join(map(repr, METRICS))
            raise BudgetError(f"the metric {self.metric!r} is not known; give one of {known}, or a function")
        if not isinstance(self.metric, str) and not callable(self.metric):
            raise BudgetError(f"the metric is a {type(self.metric).__name__}; give a name or a function")
        if not _is_number(self.limit) or not 0 <= self.limit < math.inf:
            raise BudgetError(f"the limit {self.limit!r} was given; give a number, 0 or more")
        if self.output is not None and not isinstance(self.metric, str):
            raise BudgetError("output was given with a metric of your own, which sees all outputs; leave it out")
        if not _is_number(self.confidence) or not 0.5 <= self.confidence < 1:
            raise BudgetError(f"the confidence {self.confidence!r} was given; give a number from 0.5 to 1, 1 excluded")
        if not _is_number(self.seconds) or not 0 < self.seconds < math.inf:
            raise BudgetError(f"seconds={self.seconds!r} was given; give a number above 0")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise BudgetError(f"seed={self.seed!r} was given; give a whole number")
        if isinstance(self.families, str):
            raise BudgetError(f"families={self.families!r} was given; give a tuple of names, as ({self.families!r},)")
        if self.families is not None and not (self.families and all(isinstance(name, str) for name in self.families)):
            raise BudgetError(f"families={self.families!r} was given; give names, or None for all")

    def allows(self, family: str) -> bool:
        """Whether rewrites of a family may be made."""
        return self.families is None or family in self.families

    @property
    def is_rate(self) -> bool:
        """Whether the metric counts errors."""
        return isinstance(self.metric, str) and self.metric in RATES

    def counts_errors(self, losses: NDArray[np.float64]) -> bool:
        """Whether the losses of a rewrite are errors that are counted: those of a metric of one's own are, as far as
        anyone can tell, where each is 0 or 1. No spread of them shows how many errors were not drawn."""
        return self.is_rate or (callable(self.metric) and bool(np.isin(losses, (0.0, 1.0)).all()))

    def __str__(self) -> str:
        return f"{metric_name(self.metric)} ≤ {self.limit:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
