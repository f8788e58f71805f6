"""The report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from regraft.ir.records import Refusal
from regraft.report import units
from regraft.report.budget import BudgetPoint, BudgetReport
from regraft.report.groups import refusal_groups
from regraft.report.model import Report

_REASONS_SHOWN = 10
_NAME_SHOWN = 90


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
    if report.budget is not None:
        clauses.append(budget_verdict(report.budget))
    measured = report.measured_seconds
    word, (before, after) = ("measured", measured) if measured else ("predicted", report.predicted_seconds)
    if before > 0 and after > 0:
        clauses.append(f"{word} time {units.seconds(before)} → {units.seconds(after)} ({units.ratio(before, after)})")
    return "; ".join(clauses) + "."


def budget_verdict(budget: BudgetReport) -> str:
    """What became of an accuracy budget, without a full stop."""
    limit = f"{budget.metric} ≤ {budget.limit:g}"
    if budget.refused:
        return f"accuracy budget {limit} refused: {budget.refused}"
    if not budget.spent:
        return f"accuracy budget {limit} not spent: {budget.kept_exact}"
    speed = ""
    if budget.exact_seconds and budget.seconds:
        pair = budget.exact_seconds, budget.seconds
        speed = f", {units.seconds(pair[0])} → {units.seconds(pair[1])} ({units.ratio(*pair)})"
    return f"accuracy budget {limit}: {units.drift(budget.held_out)} on {budget.samples} held-out samples{speed}"


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
    if report.budget is not None:
        yield from _budget_sections(report.budget)
    if report.phases:
        phases = [(name, units.seconds(value)) for name, value in report.phases.items()]
        yield "Compile time\n" + table(("phase", "time"), phases)
    if report.events:
        yield "Events\n" + "\n".join(f"  {event.kind}: {event.reason}" for event in report.events)


def _budget_sections(budget: BudgetReport) -> Iterator[str]:
    if budget.spent:
        rows = [
            (
                decision.site,
                decision.knob,
                units.drift(decision.predicted_loss),
                units.seconds(decision.predicted_saving),
            )
            for decision in budget.decisions
        ]
        yield "Lossy rewrites\n" + table(("site", "knob", "loss alone", "time saved alone"), rows)
        inputs = f" for {budget.inputs}" if budget.inputs else ""
        yield f"Accuracy budget{inputs}\n" + table(("", "loss", "time"), budget_rows(budget))
    if budget.points:
        points = [(point.kind, *_point_cells(point)) for point in _shown_points(budget)]
        yield "Loss and time\n" + table(("", "loss", "time", "", "rewrites"), points)
    if budget.notes:
        yield "Offered\n" + "\n".join(f"  {note}" for note in budget.notes)


def budget_rows(budget: BudgetReport) -> Iterator[tuple[str, str, str]]:
    yield "exact", "0", units.seconds(budget.exact_seconds)
    yield "predicted", units.drift(budget.predicted_loss), units.seconds(budget.predicted_seconds)
    yield "measured on calibration data", units.drift(budget.loss), units.seconds(budget.seconds)
    looks = f", look {budget.looks}" if budget.looks > 1 else ""
    sure = f"at most {units.drift(budget.held_out_bound)} at {budget.confidence:.0%}{looks}"
    bound = f"{units.drift(budget.held_out)} ({sure})"
    yield f"measured on {budget.samples} samples held out", bound, ""
    yield "limit", f"{budget.limit:g}", ""


def _shown_points(budget: BudgetReport) -> list[BudgetPoint]:
    """The measured curve; where nothing was measured, the predicted one."""
    tried = [point for point in budget.curve if point.kind != "predicted"]
    return tried if len(tried) > 1 else budget.curve


def _point_cells(point: BudgetPoint) -> tuple[str, str, str, str]:
    time = units.seconds(point.known_seconds) + (" (predicted)" if point.seconds is None else "")
    name = point.name if len(point.name) <= _NAME_SHOWN else point.name[: _NAME_SHOWN - 1] + "…"
    return units.drift(point.known_loss), time, "chosen" if point.chosen else "", name


def _refused_lines(refusals: Sequence[Refusal]) -> Iterator[str]:
    groups = refusal_groups(refusals)
    for refusal, number in groups[:_REASONS_SHOWN]:
        where = f"  [{refusal.user_line}]" if refusal.user_line else ""
        times = f" ({number} sites)" if number > 1 else ""
        yield f"  {refusal.rule}: {refusal.reason}{times}{where}"
    if len(groups) > _REASONS_SHOWN:
        yield f"  and {len(groups) - _REASONS_SHOWN} more reasons; the JSON and HTML reports hold all"
