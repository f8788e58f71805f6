"""What the driver writes down: rules that fired and rules that were refused, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Application:
    """One rewrite that was made. ``drift`` is the relative L2 change on probe inputs (None when not measured);
    ``drift_fp64`` and ``original_fp64`` are the errors of the new and the old nodes against an fp64 run. ``repeated``:
    they were measured on an earlier application that is the same computation, other parameters aside."""

    rule: str
    pass_name: str
    exactness: str
    number: int
    source_nodes: tuple[str, ...]
    new_nodes: tuple[str, ...]
    user_line: str
    recognizes: str | None = None
    drift: float | None = None
    drift_fp64: float | None = None
    original_fp64: float | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Refusal:
    """A site where a rule did not fire: the nearest miss and the first requirement that failed.

    ``kind`` is "pattern" (the graph differs from the pattern), "requirement" (a check failed) or "rolled back"
    (the rewrite was made, found wrong, and undone)."""

    rule: str
    pass_name: str
    kind: str
    node: str
    reason: str
    user_line: str
    recognizes: str | None = None


@dataclass
class RuleStatistics:
    """How often a rule was tried, fired, was refused, and the seconds that took."""

    tried: int = 0
    fired: int = 0
    refused: int = 0
    rolled_back: int = 0
    seconds: float = 0.0


@dataclass
class Log:
    """Everything that happened to one program, in order."""

    applications: list[Application] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    statistics: dict[str, RuleStatistics] = field(default_factory=dict)
    #: Kind of site -> how many the graph holds once it is recognised, sites that needed no rewrite included.
    sites: dict[str, int] = field(default_factory=dict)

    def of(self, rule: str) -> RuleStatistics:
        """The statistics of one rule."""
        return self.statistics.setdefault(rule, RuleStatistics())

    def recognized(self) -> dict[str, int]:
        """Kind of site -> how many: those of the graph where they were counted, else those that a rule recognised."""
        if self.sites:
            return dict(self.sites)
        return dict(Counter(item.recognizes for item in self.applications if item.recognizes))
