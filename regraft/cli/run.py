"""``regraft run``: run an artifact on inputs from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import toolbox
from regraft.cli.common import JsonOption, check_output, emit, guard, progress
from regraft.cli.ranks import joined
from regraft.cli.tensors import write_outputs


def run(
    artifact: Annotated[Path, typer.Argument(metavar="OUT.regraft", help="What `regraft optimize` wrote.")],
    inputs: Annotated[
        Path,
        typer.Option("--inputs", help="A safetensors file: keys are argument names, or positions 0, 1, …"),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The safetensors file to write.")],
    device: Annotated[
        str | None,
        typer.Option(help='Where it runs: "cpu", "cuda", "cuda:1"; by default the GPU that is here, if it is for one.'),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an artifact and write its outputs. Under torchrun, `{rank}` in a path is the number of the rank."""
    with guard(as_json), joined() as rank:
        artifact, inputs, output = rank.own(artifact), rank.own(inputs), rank.own_output(output)
        check_output(output, keep=(artifact, inputs))
        args, kwargs = toolbox.read_inputs(inputs)
        with progress(f"running {artifact}", as_json):
            fast = toolbox.load(artifact, device)
            args, kwargs = toolbox.on_device((args, kwargs), fast)
            shapes = write_outputs(output, fast(*args, **kwargs))
        events = [{"kind": event.kind, "reason": event.reason} for event in fast.report.events]
        emit(
            as_json,
            lambda: {"output": str(output), "tensors": shapes, "events": events},
            lambda: "\n".join(
                [
                    f"wrote {output}",
                    *(f"  {name} {shape}" for name, shape in shapes.items()),
                    *(f"  {event['kind']}: {event['reason']}" for event in events),
                ]
            ),
        )
