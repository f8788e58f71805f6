"""``regraft profile``: measured and modelled time of every operator, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli import toolbox
from regraft.cli.common import (
    InputsOption,
    JsonOption,
    TargetOption,
    UsageFault,
    check_output,
    emit,
    guard,
    progress,
)
from regraft.report import units
from regraft.report.text import table, verdict

if TYPE_CHECKING:
    from regraft.report import Report

_SHOWN = 15


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|OUT.regraft",
            help="A model as for optimize, or an artifact: then only `after` is measured.",
        ),
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML page.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a trace for Perfetto (JSON).")] = None,
    runs: Annotated[int, typer.Option("--runs", help="Runs whose median counts.")] = 5,
    target: TargetOption = None,
    inputs: InputsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every operator and set it beside the cost model."""
    with guard(as_json):
        check_output(html, trace, keep=(model, inputs))
        if runs < 1:
            raise UsageFault(f"--runs is {runs}, and a median needs at least one run; give a number from 1 up")
        with progress(f"profiling {model}", as_json):
            report = toolbox.profile(model, target, inputs, runs)
        report.model = report.model or model
        if html is not None:
            report.save_html(html)
        if trace is not None:
            from regraft.report.trace import save_trace

            save_trace(report, trace)
        written = [f"wrote {path}" for path in (html, trace) if path is not None]
        emit(as_json, report.to_json, lambda: "\n".join([_text(report), *written]))


def _text(report: Report) -> str:
    from regraft.report.profile import grouped

    parts = [verdict(report)]
    for name, rows in (("before", report.operators_before), ("after", report.operators_after)):
        groups = grouped(rows)
        if not groups:
            continue
        total = sum(group.seconds for group in groups) or 1.0
        lines = [
            (
                group.operator,
                str(group.calls),
                units.seconds(group.seconds),
                f"{group.seconds / total:.0%}",
                group.user_line,
            )
            for group in groups[:_SHOWN]
        ]
        more = f"\n  and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        parts.append(f"{name}\n" + table(("operator", "calls", "time", "share", "line"), lines) + more)
    return "\n\n".join(parts)
