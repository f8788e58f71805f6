"""``regraft bisect``: the first rewrite that breaks the tolerance."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import toolbox
from regraft.cli.common import (
    REFUSED,
    InputsOption,
    JsonOption,
    ModelArgument,
    TargetOption,
    UsageFault,
    emit,
    guard,
    progress,
)
from regraft.report import units

if TYPE_CHECKING:
    from regraft.trial import Bisection


def bisect(
    model: ModelArgument,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", help="Largest relative L2 error of the outputs; by default what `optimize` allows."
        ),
    ] = None,
    target: TargetOption = None,
    inputs: InputsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the first rule application after which the outputs leave the tolerance. Exit code 1 when there is one."""
    with guard(as_json):
        if tolerance is not None and not tolerance >= 0:
            raise UsageFault(f"the tolerance {tolerance} is not a number from 0 up; give one such as 1e-5")
        from regraft.trial import Bench

        with progress(f"bisecting {model}", as_json) as advance:
            bench = Bench(toolbox.capture(toolbox.resolve(model, inputs)), toolbox.pipeline(target))
            found = bench.bisect(tolerance, advance)
        emit(as_json, lambda: _data(found), lambda: _text(found))
        if found.turn is not None:
            raise typer.Exit(REFUSED)


def _data(found: Bisection) -> dict[str, Any]:
    return {
        "applications": found.applications,
        "error": _number(found.error),
        "tolerance": found.tolerance,
        "first_bad": None
        if found.turn is None
        else {
            "number": found.turn.number,
            "error_before": _number(found.turn.error_before),
            "error_after": _number(found.turn.error_after),
            "application": None if found.application is None else dataclasses.asdict(found.application),
            "failure": found.failure,
        },
        "rolled_back": [dataclasses.asdict(item) for item in found.rolled_back],
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _text(found: Bisection) -> str:
    lines = [_finding(found)]
    if found.application is not None and found.turn is not None:
        item = found.application
        lines += [
            f"  rule   {item.rule} (pass {item.pass_name}, {item.exactness})",
            f"  site   {', '.join(item.source_nodes)}",
            f"  line   {item.user_line or 'unknown'}",
            f"  error  {units.drift(found.turn.error_before)} before, {units.drift(found.turn.error_after)} after",
        ]
    if found.failure:
        lines.append(f"  raised {found.failure}")
    for refusal in found.rolled_back:
        lines.append(f"rolled back: {refusal.rule} at {refusal.user_line or refusal.node}: {refusal.reason}")
    return "\n".join(lines)


def _finding(found: Bisection) -> str:
    if found.turn is None:
        return (
            f"all {found.applications} rewrites together stay within the tolerance: "
            f"error {units.drift(found.error)}, allowed {units.drift(found.tolerance)}"
        )
    if found.turn.number == 0:
        return "the pipeline is out of tolerance before any rule application; the fault lies in a pass without rules"
    return (
        f"rewrite {found.turn.number} of {found.applications} is the first out of tolerance "
        f"{units.drift(found.tolerance)}"
    )
