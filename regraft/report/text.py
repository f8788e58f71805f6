"""The report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from regraft.ir.records import Refusal
from regraft.report import units
from regraft.report.groups import refusal_groups
from regraft.report.model import Report

_REASONS_SHOWN = 10


def summary(report: Report) -> str:
    """A page: verdict, recognised sites, rules, drift, time, events."""
    parts = [verdict(report), *_sections(report)]
    return "\n\n".join(parts) + "\n"


def verdict(report: Report) -> str:
    """One sentence: how many rewrites, how exact, how fast."""
    fired, refused = len(report.applications), len(report.refusals)
    clauses = [f"{fired} rewrite{'s' * (fired != 1)} made, {refused} site{'s' * (refused != 1)} refused"]
    if report.end_to_end_drift is not None:
        clauses.append(f"end-to-end drift {units.drift(report.end_to_end_drift)}")
    if report.tolerance is not None and report.end_to_end_drift is not None:
        inside = "within" if report.within_tolerance else "OUT OF"
        clauses.append(f"{inside} the tolerance {units.drift(report.tolerance)}")
    measured = report.measured_seconds
    word, (before, after) = ("measured", measured) if measured else ("predicted", report.predicted_seconds)
    if before > 0 and after > 0:
        clauses.append(f"{word} time {units.seconds(before)} → {units.seconds(after)} ({units.ratio(before, after)})")
    return "; ".join(clauses) + "."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _sections(report: Report) -> Iterator[str]:
    if report.recognized:
        found = ", ".join(f"{kind} {number}" for kind, number in sorted(report.recognized.items()))
        yield f"Recognised: {found}"
    fired = {rule: held for rule, held in report.statistics.items() if held.fired or held.refused or held.rolled_back}
    if fired:
        rows = [
            (rule, str(held.fired), str(held.refused), str(held.rolled_back), units.seconds(held.seconds))
            for rule, held in sorted(fired.items(), key=lambda item: -item[1].fired)
        ]
        yield "Rules\n" + table(("rule", "fired", "refused", "rolled back", "time"), rows)
    if report.refusals:
        yield "Refused\n" + "\n".join(_refused_lines(report.refusals))
    if report.drift:
        drift_rows = [
            (row.pass_name, str(row.applications), units.drift(row.maximum), units.drift(row.aggregated))
            for row in report.drift
        ]
        yield "Drift on probe inputs\n" + table(("pass", "rewrites", "maximum", "aggregated"), drift_rows)
    if report.phases:
        phases = [(name, units.seconds(value)) for name, value in report.phases.items()]
        yield "Compile time\n" + table(("phase", "time"), phases)
    if report.events:
        yield "Events\n" + "\n".join(f"  {event.kind}: {event.reason}" for event in report.events)


def _refused_lines(refusals: Sequence[Refusal]) -> Iterator[str]:
    groups = refusal_groups(refusals)
    for refusal, number in groups[:_REASONS_SHOWN]:
        where = f"  [{refusal.user_line}]" if refusal.user_line else ""
        times = f" ({number} sites)" if number > 1 else ""
        yield f"  {refusal.rule}: {refusal.reason}{times}{where}"
    if len(groups) > _REASONS_SHOWN:
        yield f"  and {len(groups) - _REASONS_SHOWN} more reasons; the JSON and HTML reports hold all"
