"""``regraft place``: from a routing trace to a placement of experts, beside every baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli import place_options as options
from regraft.cli.common import JsonOption, Refused, UsageFault, check_output, emit, guard, progress

if TYPE_CHECKING:
    from regraft.placement.request import Request

_OWN = "regraft"
_STEPS = 100


def place(
    topology: options.TopologyOption,
    trace: options.TraceArgument = None,
    output: options.OutputOption = None,
    form: options.FormOption = None,
    config: options.ConfigOption = None,
    weight_type: options.WeightTypeOption = "bf16",
    top_k: options.TopKOption = None,
    redundant: options.RedundantOption = 0,
    replica_budget: options.ReplicaBudgetOption = None,
    memory: options.MemoryOption = None,
    groups: options.GroupsOption = options.Groups.FREE,
    current: options.CurrentOption = None,
    current_form: options.CurrentFormOption = None,
    max_moves: options.MaxMovesOption = None,
    communication: options.CommunicationOption = options.Communication.DISPATCH,
    split: options.SplitOption = options.Split.EVEN,
    scenarios: options.ScenariosOption = options.Scenarios.SCENARIO,
    aggregate: options.AggregateOption = options.Aggregate.WEIGHTED,
    holdout: options.HoldoutOption = 0.0,
    time_limit: options.TimeLimitOption = 60.0,
    seed: options.SeedOption = 0,
    executor: options.ExecutorOption = None,
    html: options.HtmlOption = None,
    validate: options.ValidateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Plan where experts lie, and show the plan beside every baseline."""
    with guard(as_json):
        for named in (form, current_form):
            if named is not None:
                options.known_form(named)
        if validate is not None:
            _validate(validate, form, config, topology, trace, weight_type, memory, groups.value, as_json)
            return
        if trace is None or output is None:
            raise UsageFault("planning needs a TRACE and an output -o PLAN; give both, or a file to --validate")
        check_output(output, html, keep=(trace, current, config, topology))
        options.check_numbers(redundant, replica_budget, memory, holdout, time_limit, max_moves)
        options.check_together(form or _OWN, redundant, replica_budget, current, current_form, max_moves)
        from regraft.placement.request import Request

        request = Request(
            trace, topology, config, weight_type, top_k, redundant, replica_budget, memory, groups.value, current,
            current_form, max_moves, communication.value, split.value, scenarios.value, aggregate.value, holdout,
            time_limit, seed,
        )  # fmt: skip
        _plan(request, executor, output, html, form or _OWN, as_json)


def _plan(request: Request, executor: str | None, output: Path, html: Path | None, form: str, as_json: bool) -> None:
    from regraft.placement.executors import executor_of
    from regraft.placement.request import problem_of, solve_problem, write_plan
    from regraft.placement.show import comparison_data, comparison_text

    with executor_of(executor) as workers:
        with progress(f"reading {request.trace}", as_json), _stated(UsageFault):
            problem = problem_of(request, workers)
        with progress("planning", as_json, _STEPS) as advance, _stated(Refused):
            comparison = solve_problem(problem, _told(advance), workers)
    with _stated(Refused):
        write_plan(comparison.auto.plan, form, output)
    if html is not None:
        from regraft.files import write_text
        from regraft.placement.page import render

        write_text(html, render(comparison, problem.objective))
    written = {
        "plan": str(output),
        "format": form,
        "html": None if html is None else str(html),
        "assumed": problem.assumed,
    }
    paths = [f"wrote {output} ({form})", *([] if html is None else [f"wrote {html}"])]
    emit(
        as_json,
        lambda: written | comparison_data(comparison),
        lambda: "\n".join([comparison_text(comparison, request.aggregate), *problem.assumed, *paths]),
    )


def _validate(
    file: Path,
    form: str | None,
    config: Path | None,
    topology: str,
    trace: Path | None,
    weight_type: str,
    memory: float | None,
    groups: str,
    as_json: bool,
) -> None:
    """Exit code 1 with every constraint that the file's plan breaks."""
    if config is None:
        raise UsageFault("--validate checks a plan against a model; give its config.json with --config")
    if trace is not None:
        raise UsageFault(f"--validate takes no TRACE, and {trace} was given; leave it out")
    from regraft.placement.request import faults_of
    from regraft.solvers.placement.exports.kinds import plan_form

    with _stated(UsageFault):
        known = plan_form(file) if form is None else form
        plan, faults = faults_of(file, known, config, topology, weight_type, memory, groups)
    if faults:
        raise Refused(f"{file} is no valid plan: " + "; ".join(faults))
    facts: dict[str, Any] = {
        "file": str(file),
        "format": known,
        "valid": True,
        "layers": plan.num_layers,
        "ranks": plan.num_ranks,
        "experts": plan.num_experts,
        "slots_per_rank": list(plan.slots_per_rank),
    }
    emit(
        as_json,
        lambda: facts,
        lambda: (
            f"{file} is a valid plan ({known}): {plan.num_layers} layers of {plan.num_experts} experts in "
            f"{max(plan.slots_per_rank)} slots on each of {plan.num_ranks} ranks"
        ),
    )


@contextmanager
def _stated(fault: type[Exception]) -> Iterator[None]:
    """What the solver says is wrong, as a fault of the command line."""
    from regraft.solvers.placement.errors import PlacementError

    try:
        yield
    except PlacementError as error:
        raise fault(str(error)) from error


def _told(advance: Callable[[], None]) -> Callable[[float], None]:
    """The part done, 0 to 1, as steps of a bar of ``_STEPS``."""
    done = 0

    def tell(part: float) -> None:
        nonlocal done
        while done < int(part * _STEPS):
            advance()
            done += 1

    return tell
