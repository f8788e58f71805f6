"""``regraft permute``: the experts of a checkpoint in the order of a placement plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.common import JsonOption, UsageFault, emit, guard, progress

if TYPE_CHECKING:
    from regraft.permute import PermutedCheckpoint
    from regraft.solvers.placement.plan import Plan


def permute(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder: config.json and safetensors.")
    ],
    plan: Annotated[Path, typer.Option("--plan", help="The plan, as `regraft place` writes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write; a new one.")],
    as_json: JsonOption = False,
) -> None:
    """Permute expert weights and router rows: any engine that cuts experts into equal blocks loads the placement."""
    with guard(as_json):
        if not checkpoint.is_dir():
            raise UsageFault(f"there is no folder {checkpoint}; give a Hugging Face folder (config.json, safetensors)")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageFault(f"{output} exists already; give a new folder to write to")
        wanted = _plan(plan)
        from regraft.permute import permute_checkpoint, tensor_count

        with progress(f"permuting {checkpoint}", as_json, tensor_count(checkpoint)) as step:
            result = permute_checkpoint(checkpoint, wanted, output, lambda nbytes: step())
        emit(as_json, result.to_json, lambda: _text(result))


def _plan(path: Path) -> Plan:
    from regraft.solvers.placement.errors import PlacementError
    from regraft.solvers.placement.plan import Plan

    try:
        return Plan.load(path)
    except PlacementError as error:
        raise UsageFault(f"{error}; give a plan that `regraft place` wrote") from error


def _text(result: PermutedCheckpoint) -> str:
    lines = [
        f"wrote {result.folder}",
        f"  {result.moved} experts moved in {len(result.layers)} layers of {result.experts} "
        f"({result.tensors} tensors permuted, {result.nbytes / 1e9:.3f} GB in all)",
    ]
    if result.untouched:
        lines.append(
            f"  left as they were: expert layers {', '.join(map(str, result.untouched))}, beyond the model's own"
        )
    return "\n".join(lines)
