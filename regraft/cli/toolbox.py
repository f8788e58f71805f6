"""What commands call of the rest of regraft. Imports happen inside, because they bring torch with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.common import UsageFault, as_usage

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.build import Passes
    from regraft.ir.device import Device
    from regraft.ir.program import Program
    from regraft.passes.experts.sharding import Sharding
    from regraft.report import Report
    from regraft.sources import Source


def resolve(text: str, inputs: Path | None = None) -> Source:
    """The model that ``text`` names, with example inputs; those of the file ``inputs`` take their place."""
    from regraft.sources import resolve as find

    return find(text, inputs)


def read_inputs(path: Path) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments from a safetensors file."""
    from regraft.sources import read_inputs as read

    return read(path)


def capture(source: Source, dynamic: Any = None) -> Program:
    """The program of a source, not yet rewritten."""
    from regraft.ir.capture import capture as export

    return export(source.model, source.args, source.kwargs, dynamic=dynamic)


def compile_model(source: Source, **options: Any) -> Any:
    """``regraft.compile`` on a source."""
    import regraft

    if not source.args and not source.kwargs:  # an ExportedProgram carries its own; a forward may take none
        return regraft.compile(source.model, None if _is_exported(source.model) else (), **options)
    return regraft.compile(source.model, source.args, source.kwargs, **options)


def budget(text: str, calibration: Path | None, source: Source) -> dict[str, Any]:
    """What ``regraft.compile`` takes as budget and calibration, from ``kl=0.01`` and stored batches; raises
    ``UsageFault``."""
    from regraft.calibration import Call, stored_batches
    from regraft.passes.budget.budget import Budget
    from regraft.passes.budget.errors import BudgetError

    metric, separator, limit = text.partition("=")
    try:
        made = Budget(metric.strip(), float(limit))
    except BudgetError as error:
        raise UsageFault(str(error)) from error
    except ValueError as error:
        what = f"{limit!r} is not a number" if separator else "it has no limit"
        raise UsageFault(f"--budget is {text!r}, and {what}; give a metric and its limit, as kl=0.01") from error
    if calibration is None:
        if made.limit > 0:
            raise UsageFault("--budget was given without data to spend it by; give --calibration")
        return {"budget": made}
    return {"budget": made, "calibration": stored_batches(calibration, Call(tuple(source.args), dict(source.kwargs)))}


def sharding(plan: Path, rank: int, split: str, topology: str | None) -> Sharding:
    """One rank's part of a plan file; raises ``UsageFault`` for what does not exist or does not fit."""
    from regraft.passes.experts.errors import ShardingError
    from regraft.passes.experts.sharding import Sharding
    from regraft.placement.request import read_topology
    from regraft.solvers.placement.errors import PlacementError
    from regraft.solvers.placement.plan import Plan

    try:
        cluster = None if topology is None else read_topology(topology)
        return Sharding(Plan.load(plan), split, cluster=cluster, rank=rank)
    except (PlacementError, ShardingError) as error:
        raise UsageFault(str(error)) from error


def _is_exported(model: Any) -> bool:
    from torch.export import ExportedProgram

    return isinstance(model, ExportedProgram)


def load(path: Path, device: str | None = None) -> Any:
    """``regraft.load`` with failures as wrong usage."""
    import regraft

    with as_usage():
        return regraft.load(path, device=device)


def on_device(inputs: Any, fast: Any) -> Any:
    """Inputs from a file, where a loaded model runs."""
    import torch
    from torch.utils._pytree import tree_map_only

    from regraft.devices import device_of

    place = device_of(fast.entries[0].program)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(place), inputs)


def pipeline(target: str | None) -> Passes:
    """The default order of passes for a target; raises ``UsageFault`` for a target that is not known."""
    from regraft.build import Toolchain

    device(target)
    return Toolchain().pipeline(target or "cpu")


def device(target: str | None) -> Device:
    """The device that a target means; raises ``UsageFault`` for a target that is not known."""
    from regraft.ir.device import find_device

    try:
        return find_device(target or "cpu")
    except ValueError as error:
        raise UsageFault(str(error)) from error


def profile(model: str, target: str | None, inputs: Path | None, runs: int) -> Report:
    """The report of a model or artifact with the measured time of every operator."""
    from regraft.profiling import profile_artifact, profile_program

    place = device(target)
    if model.endswith(".regraft"):
        if inputs is not None:
            raise UsageFault(
                f"--inputs was given with the artifact {model}, which is profiled on the inputs that it holds"
            )
        with as_usage():
            from regraft.artifact import load as read

            loaded = read(model)
        return profile_artifact(loaded, place, runs)
    passes = pipeline(target)
    return profile_program(capture(resolve(model, inputs)), passes, place, runs)
