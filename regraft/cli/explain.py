"""``regraft explain``: every site of a model, fired or refused, and why."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import toolbox
from regraft.cli.common import (
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
from regraft.report.groups import fired_rows, refusal_groups

if TYPE_CHECKING:
    from regraft.build import Passes
    from regraft.ir.records import Application, Refusal


def explain(
    model: ModelArgument,
    rule: Annotated[str | None, typer.Option("--rule", help="Show the sites of this rule alone.")] = None,
    target: TargetOption = None,
    inputs: InputsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each rule did at each site: fired, or the requirement that failed, with the source line."""
    with guard(as_json):
        from regraft.ir.driver import Session

        passes = toolbox.pipeline(target)
        if rule is not None:
            _check_rule(rule, passes)
        session = Session(verify="each")
        with progress(f"rewriting {model}", as_json):
            passes.run(toolbox.capture(toolbox.resolve(model, inputs)), session)
        fired = [item for item in session.log.applications if rule in (None, item.rule)]
        refused = [item for item in session.log.refusals if rule in (None, item.rule)]
        emit(as_json, lambda: _data(fired, refused), lambda: _text(fired, refused, everything=rule is not None))


def _check_rule(rule: str, passes: Passes) -> None:
    known = sorted({held.name for item in getattr(passes, "passes", ()) for held in getattr(item, "rules", ())})
    if known and rule not in known:
        raise UsageFault(f"there is no rule {rule!r}; the rules are: {', '.join(known)}")


def _data(fired: list[Application], refused: list[Refusal]) -> dict[str, Any]:
    return {
        "fired": [dataclasses.asdict(item) for item in fired],
        "refused": [dataclasses.asdict(item) for item in refused],
    }


def _text(fired: list[Application], refused: list[Refusal], everything: bool) -> str:
    sites = fired if everything else [item for item in fired if item.recognizes]
    lines = [f"{len(sites)} site{'s' * (len(sites) != 1)} fired"]
    for row in fired_rows(sites):
        lines.append(f"  {row.rule} x {row.number}, largest drift {units.drift(row.drift)}")
        lines.append(f"      at {row.line or 'an unknown line'}")
    if len(fired) > len(sites):
        lines.append(f"  and {len(fired) - len(sites)} other rewrites (choose a rule with --rule to see its own)")
    lines.append(f"{len(refused)} site{'s' * (len(refused) != 1)} refused")
    for item, number in refusal_groups(refused):
        lines.append(f"  {item.rule} x {number}, {item.kind}: {item.reason}")
        lines.append(f"      at {item.user_line or 'an unknown line'}, node {item.node}")
    return "\n".join(lines)
