"""The report of one compilation: what fired, what was refused and why, what it cost and what it won."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.files import write_text
from regraft.ir.errors import RegraftError
from regraft.ir.records import Application, Log, Refusal, RuleStatistics
from regraft.report.budget import BudgetReport

SCHEMA_VERSION = 2
#: Versions that can be read: 1 lacks the accuracy budget.
READ_VERSIONS = (1, 2)


class ReportError(RegraftError, ValueError):
    """JSON that is not a report of a version that this regraft reads."""


@dataclass(frozen=True)
class Event:
    """Something that happened at run time: ``kind`` is "recapture", "fallback", "relowering", "placement" for experts
    that a plan could not move, "budget" for an accuracy budget that could not be spent, "unpadding" for what was
    decided about that, "tuning" for what was not measured on a GPU and why, "device" for an artifact on another device
    than it was compiled for, or "cuda graph" for calls that are not recorded as one."""

    kind: str
    reason: str


@dataclass(frozen=True)
class OperatorRow:
    """One node of the program before or after: its work, its least time by the cost model, its measured time.

    ``known`` is false where the cost model could count bytes only. Times are in seconds.
    """

    node: str
    operator: str
    user_line: str = ""
    provenance: tuple[str, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    predicted_seconds: float = 0.0
    measured_seconds: float | None = None
    known: bool = True


@dataclass(frozen=True)
class PassDrift:
    """Relative L2 change that the applications of one pass made on probe inputs; ``measured`` counts those where it was
    computed, and not taken from another application that is the same computation.

    ``aggregated`` is the root of the sum of squares: what independent changes add up to.
    """

    pass_name: str
    applications: int
    measured: int
    maximum: float | None
    aggregated: float | None


@dataclass(frozen=True)
class Environment:
    """Where the numbers come from. ``device`` names the hardware, ``peak_flops`` and ``bytes_per_second`` are
    the rates that the cost model used."""

    device: str = ""
    threads: int = 0
    dtype: str = ""
    peak_flops: float = 0.0
    bytes_per_second: float = 0.0
    rates_from: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What ``compile`` returns as ``fast.report``; everything has a default, and fills as the compilation goes on.

    ``phases`` are seconds by name, in order: "capture", each pass, "lowering", "verification".
    ``end_to_end_drift`` is the relative L2 error of the compiled model against the original on the example
    inputs, ``tolerance`` its bound; None where an accuracy budget was spent, whose loss is in ``budget``.
    """

    model: str = ""
    target: str = ""
    log: Log = field(default_factory=Log)
    phases: dict[str, float] = field(default_factory=dict)
    operators_before: list[OperatorRow] = field(default_factory=list)
    operators_after: list[OperatorRow] = field(default_factory=list)
    end_to_end_drift: float | None = None
    tolerance: float | None = None
    events: list[Event] = field(default_factory=list)
    environment: Environment = field(default_factory=Environment)
    budget: BudgetReport | None = None

    @property
    def recognized(self) -> dict[str, int]:
        """Kind of site -> how many were recognised; 0 for a kind whose sites were all refused."""
        kinds = {refusal.recognizes: 0 for refusal in self.log.refusals if refusal.recognizes}
        return kinds | self.log.recognized()

    @property
    def applications(self) -> list[Application]:
        """Every rewrite that was made, in order."""
        return self.log.applications

    @property
    def refusals(self) -> list[Refusal]:
        """Every site where a rule did not fire, with the reason."""
        return self.log.refusals

    @property
    def statistics(self) -> dict[str, RuleStatistics]:
        """Rule -> how often it was tried, fired and refused, and the seconds it took."""
        return self.log.statistics

    @property
    def drift(self) -> list[PassDrift]:
        """Drift of each pass that rewrote something, in the order of the passes."""
        return [_pass_drift(name, self.log.applications) for name in _passes(self.log.applications)]

    @property
    def predicted_seconds(self) -> tuple[float, float]:
        """The cost model's time before and after."""
        return _total(self.operators_before, "predicted_seconds"), _total(self.operators_after, "predicted_seconds")

    @property
    def measured_seconds(self) -> tuple[float, float] | None:
        """Sum of the operators' measured times before and after; None until both were profiled."""
        if not (_profiled(self.operators_before) and _profiled(self.operators_after)):
            return None
        return _total(self.operators_before, "measured_seconds"), _total(self.operators_after, "measured_seconds")

    @property
    def within_tolerance(self) -> bool:
        """Whether the end-to-end drift keeps the tolerance; true where either is not known."""
        if self.end_to_end_drift is None or self.tolerance is None:
            return True
        return self.end_to_end_drift <= self.tolerance  # false for NaN

    def record(self, kind: str, reason: str) -> None:
        """Note an event of the running model."""
        self.events.append(Event(kind, reason))

    def summary(self) -> str:
        """A page of text: fired, refused, drift, predicted and measured time."""
        from regraft.report.text import summary

        return summary(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``schema.json`` describes; numbers that JSON lacks become "inf", "-inf" or "nan"."""
        from regraft.report.serialize import to_json

        return to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """Inverse of :meth:`to_json`; raises ``ReportError`` for other data or another version."""
        from regraft.report.serialize import from_json

        return from_json(data)

    def save_json(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def save_html(self, path: str | Path) -> None:
        """Write one HTML file that needs nothing else: no network, no other file."""
        from regraft.report.html import render

        write_text(path, render(self))


def _passes(applications: list[Application]) -> list[str]:
    return list(dict.fromkeys(application.pass_name for application in applications))


def _pass_drift(name: str, applications: list[Application]) -> PassDrift:
    own = [application for application in applications if application.pass_name == name]
    drifts = [application.drift for application in own if application.drift is not None]
    measured = sum(application.drift is not None and not application.repeated for application in own)
    if not drifts:
        return PassDrift(name, len(own), 0, None, None)
    worst = math.nan if any(math.isnan(drift) for drift in drifts) else max(drifts)
    return PassDrift(name, len(own), measured, worst, math.sqrt(sum(drift * drift for drift in drifts)))


def _profiled(rows: list[OperatorRow]) -> bool:
    return any(row.measured_seconds is not None for row in rows)


def _total(rows: list[OperatorRow], name: str) -> float:
    return math.fsum(getattr(row, name) or 0.0 for row in rows)
