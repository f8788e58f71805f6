"""What an accuracy budget was spent on: decisions, what was predicted of them and what was measured, and the curve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """A lossy rewrite that was made: where, with which knob, and the loss and seconds saved that were predicted of it
    alone."""

    site: str
    knob: str
    user_line: str
    predicted_loss: float
    predicted_saving: float


@dataclass(frozen=True)
class BudgetPoint:
    """One composition of lossy rewrites. ``kind`` is "exact", "predicted" (by a solver, not run) or "tried". ``loss``
    is the mean on calibration data and ``held_out`` that on the data held out, None where it was not run; times are
    seconds a call, ``seconds`` None where it was not measured. ``best``: no other one of its kind is both faster and
    loses less."""

    name: str
    kind: str
    predicted_loss: float
    predicted_seconds: float
    loss: float | None = None
    held_out: float | None = None
    seconds: float | None = None
    best: bool = False
    chosen: bool = False

    @property
    def known_loss(self) -> float:
        """The loss that was measured, else the one predicted."""
        return self.predicted_loss if self.loss is None else self.loss

    @property
    def known_seconds(self) -> float:
        """The time that was measured, else the one predicted."""
        return self.predicted_seconds if self.seconds is None else self.seconds


@dataclass(frozen=True)
class BudgetReport:
    """How a budget was spent. ``refused`` says why it could not be, ``kept_exact`` why nothing was worth it; with
    either the model is the exact one. ``loss`` was measured on calibration data, ``held_out`` on ``samples`` others by
    the compiled model, ``held_out_bound`` is its upper bound at ``confidence``, which all ``looks`` share: the
    compositions that were held against the limit on these data. Times are seconds a call, measured in turn with the
    exact model; ``search_seconds`` is what finding this took, ``stop`` why it ended: "done" or "time limit"; ``gap``
    how far the solvers' choice is from their bound, 0 where they proved it the best.
    ``inputs`` are those that the model was compiled for: other shapes get exact code, because their loss was not
    measured. With symbolic sizes ``covers`` says which of them lossy code serves.
    """

    metric: str
    limit: float
    confidence: float = 0.0
    refused: str = ""
    kept_exact: str = ""
    decisions: list[Decision] = field(default_factory=list)
    predicted_loss: float | None = None
    loss: float | None = None
    held_out: float | None = None
    held_out_bound: float | None = None
    samples: int = 0
    looks: int = 0
    exact_seconds: float | None = None
    predicted_seconds: float | None = None
    seconds: float | None = None
    points: list[BudgetPoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    search_seconds: float = 0.0
    stop: str = "done"
    gap: float = 0.0
    inputs: str = ""
    covers: str = ""

    def stands_beside(self, later: BudgetReport) -> bool:
        """Whether this remains what is told of a budget when ``later`` tells of a later compilation: that for other
        inputs replaces a refusal only, and is no refusal itself."""
        return bool(self.inputs) and self.inputs != later.inputs and (bool(later.refused) or not self.refused)

    @property
    def spent(self) -> bool:
        """Whether the model is a lossy one."""
        return bool(self.decisions)

    @property
    def within_limit(self) -> bool:
        """Whether the bound of the loss on held-out data keeps the limit; so does the exact model."""
        return not self.spent or (self.held_out_bound is not None and self.held_out_bound <= self.limit)

    @property
    def curve(self) -> list[BudgetPoint]:
        """The points that no other one of their kind beats, by rising loss."""
        return sorted((point for point in self.points if point.best), key=lambda point: point.known_loss)

    @property
    def optimism(self) -> float | None:
        """How many times larger the measured loss is than the predicted one."""
        if not self.predicted_loss or self.loss is None or not math.isfinite(self.predicted_loss):
            return None
        return self.loss / self.predicted_loss
