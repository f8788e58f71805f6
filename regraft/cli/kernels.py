"""``regraft kernels``: the GPU kernels of an artifact as readable sources and as binaries, built without a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.common import JsonOption, Refused, UsageFault, emit, guard, progress

if TYPE_CHECKING:
    from regraft.kernel_files import KernelFiles, KernelRow

_INTERPRETED = "TRITON_INTERPRET"


def kernels(
    artifact: Annotated[Path, typer.Argument(metavar="OUT.regraft", help="What `regraft optimize` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write; a new one.")],
    arch: Annotated[
        str, typer.Option("--arch", help="Architectures, separated by commas; NVIDIA's sm_… or AMD's gfx….")
    ] = "sm_80,sm_90,sm_100,gfx942",
    as_json: JsonOption = False,
) -> None:
    """Write the kernels of an artifact: sources, binaries, PTX, and what each takes of the device."""
    with guard(as_json):
        if not artifact.is_file():
            raise UsageFault(f"there is no file {artifact}; give an artifact that `regraft optimize` wrote")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageFault(f"{output} exists already; give a new folder to write to")
        if not output.resolve().parent.is_dir():
            raise UsageFault(f"the folder {output.resolve().parent} does not exist; create it first")
        if os.environ.get(_INTERPRETED) == "1":
            raise UsageFault(f"{_INTERPRETED}=1 is set, under which Triton builds nothing; unset it and run again")
        from regraft.kernel_files import write_kernels

        archs = [word.strip() for word in arch.split(",") if word.strip()]
        if not archs:
            raise UsageFault(f"--arch {arch!r} names no architecture; give some, as sm_90,gfx942")
        with progress(f"building the kernels of {artifact}", as_json) as step:
            made = write_kernels(artifact, archs, output, step)
        emit(as_json, made.to_json, lambda: _text(made))
        if made.failures:
            failed = made.failures[0]
            raise Refused(f"{len(made.failures)} of {len(made.rows)} builds failed, the first: {failed.failure}")


def _text(made: KernelFiles) -> str:
    from regraft.report.text import table

    header = ("kernel", "function", "arch", "tile, warps, stages", "registers", "shared", "spills", "matrix unit")
    lines = [f"wrote {made.folder}", table(header, [_cells(row) for row in made.rows])]
    lines += [f"  {reason}" for reason in made.refusals]
    return "\n".join(lines)


def _cells(row: KernelRow) -> tuple[str, ...]:
    role = row.function.removeprefix(row.kernel).strip("_") or "main"
    if row.failure is not None:
        return row.kernel, role, row.arch, f"FAILS: {row.failure}", "", "", "", ""
    units = ", ".join(f"{name} {count}" for name, count in row.matrix_instructions.items()) or "-"
    figures = str(row.registers), f"{row.shared} B", f"{row.spilled} B"
    return row.kernel, role, row.arch, " ".join(map(str, row.config)), *figures, units
