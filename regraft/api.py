"""``compile`` and ``load``: options are checked here, the work is done elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from regraft.build import Entry, Toolchain
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.compiled import CompiledModule
from regraft.devices import device_of, move, running_device, what_differs
from regraft.errors import ArtifactError, CaptureError, OptionError, RegraftError, TargetError
from regraft.ir.capture_error import first_line
from regraft.ir.driver import Session
from regraft.ir.ops.gather import collective_calls
from regraft.ir.program import Program
from regraft.ir.records import Log
from regraft.ir.transport import group_of
from regraft.kernels import check_kernels, notes_of
from regraft.options import Options

if TYPE_CHECKING:
    from regraft.budget import Budget, Spending
    from regraft.experts import Placement

TARGETS = (
    "cpu",
    "cuda",
    "cuda:sm_80",
    "cuda:sm_86",
    "cuda:sm_89",
    "cuda:sm_90",
    "cuda:sm_100",
    "cuda:sm_120",
)
VERIFY = ("each", "final", "off")


def compile(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | None = None,
    dynamic: Any = None,
    budget: Budget | None = None,
    calibration: Any = None,
    verify: str = "each",
    experts: Any = None,
    free_original: bool = False,
    toolchain: Toolchain | None = None,
    unpad: bool = False,
    cuda_graphs: bool = False,
) -> CompiledModule:
    """Compile ``model`` for inference; the result is called as the model is and returns the same structure.

    ``example_inputs``: a tensor, a tuple of positional inputs, or a dict of keyword inputs (a model whose only
    input is a dict takes ``(that_dict,)``); ``kwargs`` adds keyword inputs to positional ones. Without any, the
    first call compiles. ``dynamic``: None for the example's shapes (a new shape is compiled when it comes, a
    bounded number of times), True for symbolic sizes wherever the model allows, or a ``torch.export``
    specification. ``verify``: "each" rewrite and the final output are compared with the original's, "final" only
    the latter, "off" neither. ``free_original`` empties the model: its weights live on only in compiled code, which
    takes their place layer by layer (they wait in a temporary file, and come back where nothing is compiled).
    ``toolchain`` replaces the passes and the lowering.

    ``target``: "cpu", "cuda" or an architecture as "cuda:sm_90"; the model's device by default. A model on the CPU can
    be compiled and saved for a GPU: here its kernels run as their definitions. See docs/lowering-triton.md.

    ``experts``: a placement plan, the path of a plan file, or a ``Sharding``. Under an initialised process group of as
    many ranks, each calls this with its own inputs and gets a model that holds its own experts only; every rank must
    make every call. Without a group the experts are permuted. See docs/placement-shard.md.

    ``budget``: a ``Budget``, which opens the lossy rewrites; ``calibration``: an iterable of batches to spend it by,
    each as ``example_inputs`` and of the shapes that are compiled for. Half of them are held out, and what is chosen
    keeps the limit on these. Where nothing does, or the calibration does not serve, the result is the exact model,
    and ``report.budget`` says why. See docs/budget.md.

    ``unpad``: where the batch has a padding mask, compute the tokens that are there, exactly, in calls with enough
    padding for that to be faster; what was decided is an event of the report. See docs/token-reduction.md.

    ``cuda_graphs``: on a GPU, record the calls of each set of fixed shapes and replay them, which saves the launches of
    kernels one by one. It takes memory of its own for each; where it does not apply, an event of the report says so.
    See docs/lowering-triton.md.

    Raises ``CaptureError`` (inputs that do not fit, a model that export refuses, training mode), ``TargetError``,
    ``OptionError``, ``PermutationError`` or ``ShardingError`` (a plan that is not for this model) and ``PeerError``
    (another rank could not compile).
    """
    spending = _spending(budget, calibration, experts, toolchain)
    _check_options(verify, dynamic, budget, experts, toolchain, unpad)
    _check_model(model)
    inputs = call_inputs(example_inputs, kwargs)
    NATIVE.start()  # built beside the capture, where it was not built before
    placement = None if experts is None else _placement(experts)
    lowered_for = _target(model, target)
    if spending is not None and lowered_for != "cpu":
        raise OptionError(
            f"a budget was given for the target {lowered_for!r}, and lossy rewrites are measured on a CPU in this "
            "version; use target='cpu', or leave the budget out"
        )
    if unpad and lowered_for != "cpu":
        raise OptionError(f"unpad was given for the target {lowered_for!r}, and works on a CPU in this version")
    chosen = toolchain or (Toolchain() if placement is None else Toolchain(pipeline=placement.pipeline))
    options = Options(
        lowered_for, dynamic, verify, toolchain=chosen, experts=placement, spending=spending, unpad=_unpadding(unpad),
        cuda_graphs=cuda_graphs, free_original=free_original,
    )  # fmt: skip
    compiled = CompiledModule(model, options, _report(type(model).__name__, options.target))
    if _rehearses(model, options.target):
        compiled.report.record("fallback", "the model is on the CPU: what is lowered for a GPU runs as its definition")
    if inputs is None and isinstance(model, ExportedProgram) and model.example_inputs is not None:
        inputs = model.example_inputs[0], dict(model.example_inputs[1])
    if inputs is not None:
        compiled.prepare(*inputs)
    if free_original:
        compiled.free_original()
    return compiled


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    cuda_graphs: bool = False,
    trust_kernels: bool = False,
) -> CompiledModule:
    """Load an artifact: lowered for this machine, not captured, rewritten or measured again. One rank's part of a
    sharded model runs in the default process group.

    ``device``: where it runs, "cpu", "cuda" or "cuda:1". By default an artifact for a GPU takes the one that is
    here, and runs on the CPU, its kernels as their definitions, where none is; an event of the report says so.
    ``cuda_graphs``: as ``compile`` takes it.

    Raises ``ArtifactError``, ``TargetError`` for a device that is not here or that the artifact is not for, and
    ``GroupError`` under a process group that the part is not for."""
    from regraft.artifact import load as read
    from regraft.report.model import Report, ReportError

    loaded = read(path, trust_kernels=trust_kernels)
    _check_group(loaded.program)
    try:
        report = Report.from_json(loaded.report) if loaded.report else _report(Path(os.fsdecode(path)).name, "cpu")
    except ReportError as error:
        raise ArtifactError(f"{os.fsdecode(path)} cannot be loaded: {error}") from error
    target = _check_target(loaded.manifest.targets[0] if loaded.manifest.targets else "cpu")
    options = Options(target=target, cuda_graphs=cuda_graphs)
    place = running_device(options.target, device)
    tuning = loaded.members.get("tuning.jsonl", b"")
    session = Session(log=Log(), verify="off", target=options.target, tuning=tuning, measures=False)
    try:
        if place != device_of(loaded.program) or place.type != "cpu":  # tensors of a file come to the CPU
            move(loaded.program, place)
        executable = options.toolchain.lower(loaded.program, session)
        other = check_kernels(executable, loaded.manifest.members)
    except RegraftError as error:
        raise ArtifactError(f"{os.fsdecode(path)} cannot be loaded: {error}") from error
    except Exception as error:  # a graph that no capture made can fail anywhere
        raise ArtifactError(
            f"{os.fsdecode(path)} cannot be loaded: its graph cannot be lowered ({first_line(error)}); "
            "save the model again"
        ) from error
    told = [("relowering", other), ("device", what_differs(options.target, place))]
    for kind, reason in (*told, *(("tuning", note) for note in notes_of(executable))):
        if reason is not None:
            report.record(kind, reason)
    compiled = CompiledModule(None, options, report)
    compiled.install(Entry(loaded.program, executable))
    return compiled


def call_inputs(example_inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positional and keyword inputs from what ``compile`` was given; None when nothing was."""
    named = dict(kwargs or {})
    if example_inputs is None:
        return ((), named) if kwargs is not None else None
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), named
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **named}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), named
    raise CaptureError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional inputs or a dict "
        "of keyword inputs"
    )


def _check_options(verify: Any, dynamic: Any, budget: Any, experts: Any, toolchain: Any, unpad: bool) -> None:
    """Raises ``OptionError`` for options of ``compile`` that are unknown or do not go together."""
    if experts is not None and toolchain is not None:
        raise OptionError("experts and toolchain were given, and a toolchain brings its own passes; give one of them")
    if unpad and (experts is not None or toolchain is not None or budget is not None):
        raise OptionError("unpad was given with experts, a toolchain or a budget, and goes with none of them yet")
    if verify not in VERIFY:
        raise OptionError(f"verify={verify!r} was given; choose one of {', '.join(map(repr, VERIFY))}")
    if isinstance(dynamic, (str, int, float)) and not isinstance(dynamic, bool):
        raise OptionError(
            f"dynamic={dynamic!r} was given; give None, True, or a specification as torch.export takes it"
        )


def _check_model(model: Any) -> None:
    """Raises ``CaptureError`` for what cannot be compiled."""
    if isinstance(model, CompiledModule):
        raise CaptureError("the model is compiled already; compile the original, it is in its attribute `original`")
    inner = () if not isinstance(model, nn.Module) else model.named_modules()
    name = next((name for name, module in inner if isinstance(module, CompiledModule)), None)
    if name is not None:
        raise CaptureError(
            f"a part of the model, {name}, is compiled already; give a model that holds what its `original` is instead"
        )
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise CaptureError(
            f"a {type(model).__name__} was given as the model; give an nn.Module, an ExportedProgram or a GraphModule"
        )
    if isinstance(model, nn.Module) and model.training and not isinstance(model, torch.fx.GraphModule):
        raise CaptureError(
            f"{type(model).__name__} is in training mode, and regraft compiles for inference; call model.eval() first"
        )


def _spending(budget: Any, calibration: Any, experts: Any, toolchain: Any) -> Spending | None:
    """What ``compile`` was told about accuracy. Raises ``OptionError`` for options that do not go together."""
    if budget is None:
        if calibration is not None:
            raise OptionError("calibration was given without a budget; give one, or leave the calibration out")
        return None
    from regraft.budget import Budget, BudgetError, Spending  # solvers take a moment to load
    from regraft.calibration import read_batches

    if not isinstance(budget, Budget):
        raise OptionError(
            f'a {type(budget).__name__} was given as the budget; give a regraft.Budget, as Budget("kl", 0.01)'
        )
    if experts is not None or toolchain is not None:
        other = "experts" if experts is not None else "toolchain"
        raise OptionError(f"budget and {other} were given, which bring passes of their own each; give one of them")
    if calibration is None:
        if budget.limit > 0:
            raise OptionError("a budget was given without calibration data to spend it by; give calibration=batches")
        return Spending(budget, ())
    try:
        return Spending(budget, tuple(read_batches(calibration)))
    except BudgetError as error:
        raise OptionError(str(error)) from error


def _placement(experts: Any) -> Placement:
    from regraft.experts import placement_of  # solvers take a moment to load, and few models have experts to place

    return placement_of(experts)


def _unpadding(asked: bool) -> Callable[..., str] | None:
    if not asked:
        return None
    from regraft.unpad import unpadded

    return unpadded


def _check_group(program: Program) -> None:
    """Where a process group is there already, a sharded program must be the one for it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        for given in collective_calls(program.graph):
            group_of(given["group"], given["ranks"], given["rank"])


def _target(model: nn.Module | ExportedProgram, target: str | None) -> str:
    tensors = model.state_dict.values() if isinstance(model, ExportedProgram) else _weights(model)
    devices = {tensor.device for tensor in tensors}
    if any(device.type == "meta" for device in devices):
        raise CaptureError("the model's weights are on the meta device, without values; load its weights first")
    if len(devices) > 1:
        raise CaptureError(
            f"the model's weights are on several devices ({', '.join(sorted(map(str, devices)))}); move it to one"
        )
    device = next(iter(devices)).type if devices else "cpu"
    chosen = _check_target(target if target is not None else device)
    elsewhere = devices and chosen.partition(":")[0] != device
    if elsewhere and device != "cpu":  # on a CPU what is lowered for a GPU runs too, by its kernels' definitions
        raise TargetError(
            f"the target is {chosen!r}, and the model's weights are on {device}; move the model with "
            f"model.to({chosen.partition(':')[0]!r}), or leave target out"
        )
    return chosen


def _rehearses(model: nn.Module | ExportedProgram, target: str) -> bool:
    """Whether a model on the CPU is compiled for a GPU."""
    tensors = model.state_dict.values() if isinstance(model, ExportedProgram) else _weights(model)
    return target != "cpu" and all(tensor.device.type == "cpu" for tensor in tensors)


def _check_target(target: str) -> str:
    if target not in TARGETS:
        raise TargetError(f"there is no target {target!r}; the targets are {', '.join(TARGETS)}")
    return target


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _report(model: str, target: str) -> Any:
    from regraft.report.model import Report

    return Report(model=model, target=target)
