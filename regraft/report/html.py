"""The report as one HTML page that needs no network and no other file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from regraft.report import units
from regraft.report.curve import curve_svg
from regraft.report.groups import fired_rows, refusal_groups
from regraft.report.model import OperatorRow, Report
from regraft.report.roofline import roofline_svg
from regraft.report.text import budget_rows, budget_verdict, verdict

_BARS = 14
_PATH_PARTS = 2


@dataclass(frozen=True)
class Tile:
    """One number of the header."""

    label: str
    value: str
    note: str = ""
    state: str = ""


@dataclass(frozen=True)
class SiteRow:
    """Sites of one kind: how many were recognised, by which rules, and how many were refused."""

    kind: str
    found: int
    refused: int
    rules: str


@dataclass(frozen=True)
class OperatorTotal:
    """One operator before and after: calls and seconds; ``share_*`` are parts of the longest bar, in percent."""

    operator: str
    calls_before: int
    calls_after: int
    before: float
    after: float
    share_before: float = 0.0
    share_after: float = 0.0


def render(report: Report) -> str:
    """The page as text; all that comes from the model or its source is escaped."""
    totals = operator_totals(report)
    measured = report.measured_seconds is not None
    page = _environment().get_template("report.html.j2")
    return page.render(
        report=report,
        style=_resource("report.css.j2"),
        script=_resource("report.js.j2"),
        verdict=verdict(report),
        tiles=tiles(report),
        sites=site_rows(report),
        fired=fired_rows(report.applications),
        refused=refusal_groups(report.refusals),
        rules=sorted(report.statistics.items(), key=lambda item: (-item[1].fired, item[0])),
        totals=totals,
        bars=totals[:_BARS],
        time_kind="measured" if measured else "predicted",
        operator_rows=_operator_lines(report),
        roofline=roofline_svg(report),
        phase_total=sum(report.phases.values()),
        budget_verdict="" if report.budget is None else budget_verdict(report.budget),
        budget_rows=[] if report.budget is None else list(budget_rows(report.budget)),
        budget_curve=None if report.budget is None else curve_svg(report.budget),
    )


def tiles(report: Report) -> list[Tile]:
    """The numbers that a reader looks for first."""
    made = [Tile("Rewrites", str(len(report.applications)), f"{len(report.refusals)} sites refused")]
    pairs = (("Measured speed-up", report.measured_seconds), ("Predicted speed-up", report.predicted_seconds))
    for label, pair in pairs:
        if pair is not None and pair[0] > 0 and pair[1] > 0:
            note = f"{units.seconds(pair[0])} → {units.seconds(pair[1])}"
            made.append(Tile(label, units.ratio(*pair), note))
    if report.end_to_end_drift is not None:
        bound = "" if report.tolerance is None else f"tolerance {units.drift(report.tolerance)}"
        state = ("good" if report.within_tolerance else "bad") if bound else ""
        made.append(Tile("End-to-end drift", units.drift(report.end_to_end_drift), bound, state))
    if report.phases:
        made.append(Tile("Compile time", units.seconds(sum(report.phases.values()))))
    return made


def site_rows(report: Report) -> list[SiteRow]:
    """Recognised sites by kind, with the rules that found them."""
    refused = [refusal.recognizes for refusal in report.refusals]
    return [
        SiteRow(
            kind,
            number,
            refused.count(kind),
            ", ".join(dict.fromkeys(item.rule for item in report.applications if item.recognizes == kind)),
        )
        for kind, number in sorted(report.recognized.items())
    ]


def operator_totals(report: Report) -> list[OperatorTotal]:
    """Time of each operator before and after, longest first; operators that take no time are left out."""
    measured = report.measured_seconds is not None
    before, after = (_by_operator(rows, measured) for rows in (report.operators_before, report.operators_after))
    longest = max([*(held[1] for held in before.values()), *(held[1] for held in after.values())], default=0.0)
    made = []
    for name in dict.fromkeys([*before, *after]):
        (old_calls, old), (new_calls, new) = before.get(name, (0, 0.0)), after.get(name, (0, 0.0))
        if old or new:
            shares = 100 * old / longest, 100 * new / longest
            made.append(OperatorTotal(name, old_calls, new_calls, old, new, *shares))
    return sorted(made, key=lambda total: -max(total.before, total.after))


def short_line(line: str) -> str:
    """A user line with only the last parts of its path: ``…/llama/modeling.py:31 in forward``."""
    path, separator, rest = line.partition(":")
    parts = path.replace("\\", "/").split("/")
    if len(parts) <= _PATH_PARTS:
        return line
    return "…/" + "/".join(parts[-_PATH_PARTS:]) + separator + rest


def _by_operator(rows: Sequence[OperatorRow], measured: bool) -> dict[str, tuple[int, float]]:
    totals: dict[str, tuple[int, float]] = {}
    for row in rows:
        calls, spent = totals.get(row.operator, (0, 0.0))
        own = (row.measured_seconds or 0.0) if measured else row.predicted_seconds
        totals[row.operator] = calls + 1, spent + own
    return totals


def _operator_lines(report: Report) -> list[tuple[str, OperatorRow]]:
    lines = [("before", row) for row in report.operators_before] + [("after", row) for row in report.operators_after]
    timed = [(when, row) for when, row in lines if row.predicted_seconds or row.measured_seconds]
    return sorted(timed, key=lambda item: -(item[1].measured_seconds or item[1].predicted_seconds))


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "seconds": units.seconds,
        "drift": units.drift,
        "count": units.count,
        "ratio": lambda pair: units.ratio(*pair),
        "short_line": short_line,
        "breakable": breakable,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    return environment


def breakable(name: str) -> Markup:
    """A long name that may be broken after its underscores and dots, and not within a word."""
    return Markup(re.sub(r"([_.])(?=\w)", r"\1<wbr>", str(escape(name))))


def _source(name: str) -> str:
    return files("regraft.report").joinpath(name).read_text(encoding="utf-8")


def _resource(name: str) -> Markup:
    return Markup(_source(name))  # our own file, not user text
