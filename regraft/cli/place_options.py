"""The options of ``regraft place``: what each is called, takes and means, and what numbers are allowed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from regraft.cli.common import UsageFault


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


TraceArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="TRACE",
        help="A routing trace: ours (.npz, .safetensors), TensorRT-LLM's folder, vLLM's JSON lines, SGLang's .pt, "
        "or recorded counts (JSON).",
    ),
]
TopologyOption = Annotated[
    str,
    typer.Option("--topology", metavar="FILE|PRESET", help="A TOML file, or h100x8, h100x16, h100x32, h100x64, nvl72."),
]
OutputOption = Annotated[Path | None, typer.Option("-o", "--output", metavar="PLAN", help="The plan to write.")]
FormOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Whose form the plan is written in: regraft (the default), sglang, trtllm, vllm, vllm-41141, vllm-49572, "
        "vllm-34811, vllm-ascend, omni or easyinfra. With --validate: that of the file, else told by its content.",
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The model's Hugging Face config.json: sizes, layers, groups.")
]
WeightTypeOption = Annotated[
    str, typer.Option("--weight-type", help="Element type of the weights in service: fp8, int8, bf16, fp16, fp32.")
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", help="Experts per token, where neither trace nor config says.")
]
RedundantOption = Annotated[
    int, typer.Option("--redundant", help="Slots beyond the experts in each layer, over all ranks.")
]
ReplicaBudgetOption = Annotated[
    float | None,
    typer.Option(
        "--replica-budget",
        metavar="GB",
        help="GB of copies a rank may hold beside its experts, spent on the layers where they balance most; layers "
        "then differ in slots.",
    ),
]
MemoryOption = Annotated[
    float | None, typer.Option("--memory", help="GB of expert weights a rank may hold; by default all it has.")
]
GroupsOption = Annotated[
    Groups, typer.Option("--groups", help="Router groups: anywhere, whole on a node, or whole in a block of slots.")
]
CurrentOption = Annotated[
    Path | None,
    typer.Option("--current", help="The plan in service, ours or an engine's: reports the migration from it."),
]
CurrentFormOption = Annotated[
    str | None, typer.Option("--current-format", help="Its form, as of --format; by default told by its content.")
]
MaxMovesOption = Annotated[
    int | None, typer.Option("--max-moves", help="Experts that may newly come to ranks; needs --current.")
]
CommunicationOption = Annotated[
    Communication,
    typer.Option("--communication", help="A copy per destination, one per expert, or tokens that stay (MoETuner)."),
]
SplitOption = Annotated[
    Split, typer.Option("--split", help="Tokens go evenly to an expert's copies, or to the nearest.")
]
ScenariosOption = Annotated[Scenarios, typer.Option("--scenarios", help="What is planned for side by side.")]
AggregateOption = Annotated[
    Aggregate, typer.Option("--aggregate", help="Minimise the mean over scenarios, or the worst one's slowdown.")
]
HoldoutOption = Annotated[float, typer.Option("--holdout", help="Part of the batches that is only scored on, 0 to 1.")]
TimeLimitOption = Annotated[
    float, typer.Option("--time-limit", help="Seconds of planning; 0 gives the best baseline that is valid.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="The same seed gives the same plan, unless time ran out.")]
ExecutorOption = Annotated[
    str | None,
    typer.Option("--executor", help="none, a number of local processes, or a Dask scheduler's tcp://host:port."),
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", help="Also write a page: load, traffic, tail, memory, every method.")
]
ValidateOption = Annotated[
    Path | None, typer.Option("--validate", help="Instead of planning, read this placement file and check it.")
]


def check_numbers(
    redundant: int,
    replica_budget: float | None,
    memory: float | None,
    holdout: float,
    time_limit: float,
    max_moves: int | None,
) -> None:
    """Raise ``UsageFault`` for a number that means nothing."""
    if redundant < 0:
        raise UsageFault(f"--redundant is {redundant}; give a number of slots from 0 up")
    if replica_budget is not None and not replica_budget >= 0:
        raise UsageFault(f"--replica-budget is {replica_budget}; give a number of GB from 0 up")
    if memory is not None and not memory > 0:
        raise UsageFault(f"--memory is {memory}; give a number of GB above 0")
    if not 0.0 <= holdout < 1.0:
        raise UsageFault(f"--holdout is {holdout}; give a part of the batches from 0 to below 1, such as 0.25")
    if not time_limit >= 0.0:
        raise UsageFault(f"--time-limit is {time_limit}; give a number of seconds from 0 up")
    if max_moves is not None and max_moves < 0:
        raise UsageFault(f"--max-moves is {max_moves}; give a number from 0 up")


def check_together(
    form: str,
    redundant: int,
    replica_budget: float | None,
    current: Path | None,
    current_form: str | None,
    max_moves: int | None,
) -> None:
    """Raise ``UsageFault`` for options that contradict each other."""
    if current is None and max_moves is not None:
        raise UsageFault("--max-moves bounds what moves from a plan in service; give that plan with --current")
    if current is None and current_form is not None:
        raise UsageFault("--current-format is the form of a plan in service; give that plan with --current")
    if replica_budget is None:
        return
    if redundant:
        raise UsageFault(
            "--redundant gives every layer the same slots and --replica-budget each its own; give one of them"
        )
    if max_moves is not None:
        raise UsageFault(
            "with --max-moves slots stay as they are in the plan in service; leave --replica-budget out, or --max-moves"
        )
    from regraft.solvers.placement.exports.all import UNEQUAL_LAYERS
    from regraft.solvers.placement.exports.kinds import OWN_FORM

    if form not in (OWN_FORM, *UNEQUAL_LAYERS):
        raise UsageFault(
            f"--replica-budget gives layers different numbers of slots, and format {form!r} wants the same in every "
            f"layer; use --redundant, or one of the formats {OWN_FORM}, {', '.join(UNEQUAL_LAYERS)}"
        )


def known_form(form: str) -> str:
    """``form``, held against the forms that there are. Raises ``UsageFault``."""
    from regraft.solvers.placement.exports.all import FORMATS
    from regraft.solvers.placement.exports.kinds import OWN_FORM

    if form not in (OWN_FORM, *FORMATS):
        raise UsageFault(f"format {form!r} was named; expected one of {OWN_FORM}, {', '.join(FORMATS)}")
    return form
