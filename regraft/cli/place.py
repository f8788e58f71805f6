"""``regraft place``: from a routing trace to a placement of experts, beside every baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.common import JsonOption, Refused, UsageFault, check_output, emit, guard, progress

if TYPE_CHECKING:
    from regraft.placement.request import Request

_OWN = "regraft"
_STEPS = 100


class Communication(StrEnum):
    """What the engine sends."""

    DISPATCH = "dispatch"
    PER_EXPERT = "per-expert"
    RESIDENT = "resident"


class Split(StrEnum):
    """How tokens are dealt to the copies of an expert."""

    EVEN = "even"
    NEAREST = "nearest"


class Scenarios(StrEnum):
    """What makes a scenario."""

    SCENARIO = "scenario"
    PHASE = "phase"
    BOTH = "both"
    ALL = "all"


class Aggregate(StrEnum):
    """How scenarios are joined."""

    WEIGHTED = "weighted"
    MIN_MAX = "min-max"


class Groups(StrEnum):
    """How router groups are kept."""

    FREE = "free"
    NODE = "node"
    BLOCK = "block"


def place(
    topology: Annotated[
        str,
        typer.Option(
            "--topology", metavar="FILE|PRESET", help="A TOML file, or h100x8, h100x16, h100x32, h100x64, nvl72."
        ),
    ],
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="TRACE",
            help="A routing trace: ours (.npz, .safetensors), TensorRT-LLM's folder, vLLM's JSON lines, SGLang's .pt, "
            "or recorded counts (JSON).",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="PLAN", help="The plan to write.")] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="Whose form the plan is written in: regraft, sglang, trtllm, vllm, vllm-41141, vllm-49572, "
            "vllm-34811, vllm-ascend, omni or easyinfra.",
        ),
    ] = _OWN,
    config: Annotated[
        Path | None, typer.Option("--config", help="The model's Hugging Face config.json: sizes, layers, groups.")
    ] = None,
    weight_type: Annotated[
        str, typer.Option("--weight-type", help="Element type of the weights in service: fp8, int8, bf16, fp16, fp32.")
    ] = "bf16",
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Experts per token, where neither trace nor config says.")
    ] = None,
    redundant: Annotated[
        int, typer.Option("--redundant", help="Slots beyond the experts in each layer, over all ranks.")
    ] = 0,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GB of expert weights a rank may hold; by default all it has.")
    ] = None,
    groups: Annotated[
        Groups, typer.Option("--groups", help="Router groups: anywhere, whole on a node, or whole in a block of slots.")
    ] = Groups.FREE,
    current: Annotated[
        Path | None, typer.Option("--current", help="The plan in service (our form): reports the migration from it.")
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option("--max-moves", help="Experts that may newly come to ranks; needs --current.")
    ] = None,
    communication: Annotated[
        Communication,
        typer.Option("--communication", help="A copy per destination, one per expert, or tokens that stay (MoETuner)."),
    ] = Communication.DISPATCH,
    split: Annotated[
        Split, typer.Option("--split", help="Tokens go evenly to an expert's copies, or to the nearest.")
    ] = Split.EVEN,
    scenarios: Annotated[
        Scenarios, typer.Option("--scenarios", help="What is planned for side by side.")
    ] = Scenarios.SCENARIO,
    aggregate: Annotated[
        Aggregate, typer.Option("--aggregate", help="Minimise the mean over scenarios, or the worst one's slowdown.")
    ] = Aggregate.WEIGHTED,
    holdout: Annotated[
        float, typer.Option("--holdout", help="Part of the batches that is only scored on, 0 to 1.")
    ] = 0.0,
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="Seconds of planning; 0 gives the best baseline that is valid.")
    ] = 60.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same plan, unless time ran out.")] = 0,
    executor: Annotated[
        str | None,
        typer.Option("--executor", help="none, a number of local processes, or a Dask scheduler's tcp://host:port."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page: load, traffic, tail, memory, every method.")
    ] = None,
    validate: Annotated[
        Path | None,
        typer.Option("--validate", help="Instead of planning, read this file of --format and check it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan where experts lie, and show the plan beside every baseline."""
    with guard(as_json):
        _check_form(form)
        if validate is not None:
            _validate(validate, form, config, topology, trace, weight_type, memory, groups.value, as_json)
            return
        if trace is None or output is None:
            raise UsageFault("planning needs a TRACE and an output -o PLAN; give both, or a file to --validate")
        check_output(output, html, keep=(trace, current, config, topology))
        _check_numbers(redundant, memory, holdout, time_limit, max_moves, current)
        from regraft.placement.request import Request

        request = Request(
            trace, topology, config, weight_type, top_k, redundant, memory, groups.value, current, max_moves,
            communication.value, split.value, scenarios.value, aggregate.value, holdout, time_limit, seed, executor,
        )  # fmt: skip
        _plan(request, output, html, form, as_json)


def _plan(request: Request, output: Path, html: Path | None, form: str, as_json: bool) -> None:
    from regraft.placement.request import problem_of, solve_problem, write_plan
    from regraft.placement.show import comparison_data, comparison_text

    with progress(f"reading {request.trace}", as_json), _stated(UsageFault):
        problem = problem_of(request)
    with progress("planning", as_json, _STEPS) as advance, _stated(Refused):
        comparison = solve_problem(problem, _told(advance))
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
    form: str,
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

    with _stated(UsageFault):
        plan, faults = faults_of(file, form, config, topology, weight_type, memory, groups)
    if faults:
        raise Refused(f"{file} is no valid plan: " + "; ".join(faults))
    facts: dict[str, Any] = {
        "file": str(file),
        "format": form,
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
            f"{file} is a valid plan ({form}): {plan.num_layers} layers of {plan.num_experts} experts in "
            f"{max(plan.slots_per_rank)} slots on each of {plan.num_ranks} ranks"
        ),
    )


def _check_form(form: str) -> None:
    from regraft.solvers.placement.exports.all import FORMATS

    if form not in (_OWN, *FORMATS):
        raise UsageFault(f"format {form!r} was named; expected one of {_OWN}, {', '.join(FORMATS)}")


def _check_numbers(
    redundant: int,
    memory: float | None,
    holdout: float,
    time_limit: float,
    max_moves: int | None,
    current: Path | None,
) -> None:
    if redundant < 0:
        raise UsageFault(f"--redundant is {redundant}; give a number of slots from 0 up")
    if memory is not None and not memory > 0:
        raise UsageFault(f"--memory is {memory}; give a number of GB above 0")
    if not 0.0 <= holdout < 1.0:
        raise UsageFault(f"--holdout is {holdout}; give a part of the batches from 0 to below 1, such as 0.25")
    if not time_limit >= 0.0:
        raise UsageFault(f"--time-limit is {time_limit}; give a number of seconds from 0 up")
    if max_moves is not None and max_moves < 0:
        raise UsageFault(f"--max-moves is {max_moves}; give a number from 0 up")
    if max_moves is not None and current is None:
        raise UsageFault("--max-moves bounds what moves from a plan in service; give that plan with --current")


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
