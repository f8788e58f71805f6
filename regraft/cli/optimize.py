"""``regraft optimize``: compile a model into an artifact."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli import toolbox
from regraft.cli.common import (
    InputsOption,
    JsonOption,
    ModelArgument,
    Refused,
    TargetOption,
    UsageFault,
    check_output,
    emit,
    guard,
    progress,
)
from regraft.report import units


class Verify(StrEnum):
    """When numbers are checked."""

    EACH = "each"
    FINAL = "final"
    OFF = "off"


class Split(StrEnum):
    """Which copy of an expert a token uses."""

    EVEN = "even"
    NEAREST = "nearest"


def optimize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.regraft", help="The artifact to write.")],
    target: TargetOption = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the report as one HTML page.")] = None,
    verify: Annotated[
        Verify, typer.Option("--verify", help="Check numbers after each rewrite, at the end, or not.")
    ] = Verify.EACH,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Keep every size that can be symbolic so.")] = False,
    inputs: InputsOption = None,
    experts: Annotated[
        Path | None, typer.Option("--experts", metavar="PLAN", help="A plan of `regraft place`: permutes the experts.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Shard the experts instead: the part of this rank of the plan.")
    ] = None,
    split: Annotated[
        Split, typer.Option("--split", help="With --rank: which copy of a replicated expert a token uses.")
    ] = Split.EVEN,
    topology: Annotated[
        str | None, typer.Option("--topology", help="With --split nearest: the nodes, a preset or a TOML file.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="METRIC=LIMIT", help="The accuracy that may be lost, as kl=0.01; see --calibration."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="With --budget: a safetensors file of many samples, or a folder with a file for each batch.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile MODEL, check it, and write the artifact."""
    with guard(as_json):
        check_output(output, html, keep=(model, inputs, experts, calibration))
        placed = _placed(experts, rank, split, topology)
        if calibration is not None and budget is None:
            raise UsageFault("--calibration is what a budget is spent by; give the budget with --budget")
        with progress(f"compiling {model}", as_json):
            source = toolbox.resolve(model, inputs)
            lossy = toolbox.budget(budget, calibration, source) if budget is not None else {}
            fast = toolbox.compile_model(
                source, target=target, dynamic=True if dynamic else None, verify=verify.value, experts=placed, **lossy
            )
        report = fast.report
        report.model = report.model or model
        if html is not None:
            report.save_html(html)
        if report.budget is not None and report.budget.refused and fast.entries:
            raise Refused(
                f"the accuracy budget was refused ({report.budget.refused}), so {output} was not written; "
                "leave --budget out to write the exact model"
            )
        if not report.within_tolerance:
            raise Refused(
                f"the compiled model is out of tolerance (relative L2 error "
                f"{units.drift(report.end_to_end_drift)}, allowed {units.drift(report.tolerance)}), "
                f"so {output} was not written; find the rewrite with: regraft bisect {model}"
            )
        if not fast.entries:
            reasons = "; ".join(event.reason for event in report.events) or "no reason was recorded"
            raise Refused(f"{model} was not compiled, so {output} was not written: {reasons}")
        with progress(f"writing {output}", as_json):
            fast.save(output)
        emit(as_json, lambda: _data(output, html, report), lambda: _text(output, html, report))


def _placed(experts: Path | None, rank: int | None, split: Split, topology: str | None) -> Any:
    """What ``regraft.compile`` takes as ``experts``. Raises ``UsageFault``."""
    if experts is None:
        if rank is not None or topology is not None or split is not Split.EVEN:
            raise UsageFault("--rank, --split and --topology say how a plan is run; give the plan with --experts")
        return None
    if rank is None:
        if topology is not None or split is not Split.EVEN:
            raise UsageFault("--split and --topology are for one rank's part of a plan; give it with --rank")
        return experts
    return toolbox.sharding(experts, rank, split.value, topology)


def _data(output: Path, html: Path | None, report: Any) -> dict[str, Any]:
    return {"artifact": str(output), "html": None if html is None else str(html), "report": report.to_json()}


def _text(output: Path, html: Path | None, report: Any) -> str:
    written = [f"wrote {output}", *([f"wrote {html}"] if html is not None else [])]
    return f"{report.summary()}\n" + "\n".join(written)
