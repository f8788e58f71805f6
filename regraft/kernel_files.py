"""The kernels of an artifact as files: each one's text, and its binaries for the architectures asked for.

``<folder>/<kernel>/source.py`` stands alone, needing torch and triton only. Beside it lie, for each function and
architecture, ``sm_90.cubin`` with ``sm_90.ptx``, or ``gfx942.hsaco`` with ``gfx942.amdgcn``; a second function's name
comes in front (``combine.sm_90.cubin``). ``kernels.json`` says what each binary takes and how it is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regraft.artifact import load as read
from regraft.codegen.triton.build import Build, BuildError, gpu_target, try_build
from regraft.codegen.triton.emit import Entry, Kernel
from regraft.codegen.triton.lower import lower
from regraft.codegen.triton.tuner import KernelTuner
from regraft.codegen.triton.tuning_records import TuningError
from regraft.errors import ArtifactError, TargetError
from regraft.ir.records import Log
from regraft.kernels import check_kernels


@dataclass(frozen=True)
class KernelRow:
    """One function of a kernel for one architecture: what the compiler says that it takes, or why it failed."""

    kernel: str
    function: str
    arch: str
    config: tuple[int, ...] = ()
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    matrix_instructions: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class KernelFiles:
    """What was written: a row a function and architecture, and why sites have no kernel."""

    folder: Path
    rows: tuple[KernelRow, ...]
    refusals: tuple[str, ...]

    @property
    def failures(self) -> list[KernelRow]:
        """What the compiler refused."""
        return [row for row in self.rows if row.failure is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "output": os.fspath(self.folder),
            "kernels": sorted({row.kernel for row in self.rows}),
            "rows": [asdict(row) for row in self.rows],
            "refused": list(self.refusals),
        }


def artifact_kernels(artifact: Path) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """The kernels that an artifact calls on a GPU, and why sites have none. Raises ``ArtifactError``."""
    loaded, log = read(artifact), Log()
    targets, tuning = loaded.manifest.targets, loaded.members.get("tuning.jsonl", b"")
    target = next((target for target in targets if target != "cpu"), None)
    try:  # what a CPU's records say is not about these kernels
        tuner = None if target is None else KernelTuner.of(loaded.program, target, tuning, measures=False)
    except TuningError as error:
        raise ArtifactError(f"{artifact} cannot be read: {error}") from error
    executable = lower(loaded.program, log, tuner)
    if target is not None:
        try:
            check_kernels(executable, loaded.manifest.members)
        except ArtifactError as error:
            raise ArtifactError(f"{artifact} cannot be read: {error}") from error
    return executable.kernels, tuple(dict.fromkeys(refusal.reason for refusal in log.refusals))


def check_archs(archs: Sequence[str]) -> None:
    """Raises ``TargetError`` for a word that is no architecture."""
    for arch in archs:
        try:
            gpu_target(arch)
        except ValueError as error:
            raise TargetError(f"{error}; give --arch a list of these") from error


def write_kernels(
    artifact: Path, archs: Sequence[str], output: Path, step: Callable[[], None] = lambda: None
) -> KernelFiles:
    """Build an artifact's kernels and write them to the new folder ``output``, which appears whole or not at all;
    ``step`` is called after each build. A build that the compiler refuses is a row with its reason. Raises
    ``ArtifactError`` and ``TargetError``."""
    check_archs(archs)
    kernels, refusals = artifact_kernels(artifact)
    if not kernels:
        why = "; ".join(refusals) or "its graph holds no attention"
        raise ArtifactError(f"{artifact} has no kernels to write: {why}")
    folder = Path(tempfile.mkdtemp(prefix=".regraft.", dir=output.resolve().parent))
    try:
        rows = [row for kernel in kernels for row in _write_kernel(kernel, archs, folder, step)]
        text = json.dumps(
            {"kernels": [_described(kernel) for kernel in kernels], "rows": [asdict(row) for row in rows]}
        )
        (folder / "kernels.json").write_text(text + "\n", encoding="utf-8")
        folder.chmod(0o755)
        if output.is_dir():
            output.rmdir()  # an empty one
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return KernelFiles(output, tuple(rows), refusals)


def _write_kernel(kernel: Kernel, archs: Sequence[str], folder: Path, step: Callable[[], None]) -> list[KernelRow]:
    place = folder / kernel.name
    place.mkdir()
    (place / "source.py").write_text(kernel.source, encoding="utf-8")
    rows = []
    for entry in kernel.entries:
        for arch in archs:
            rows.append(_row(kernel, entry, arch, try_build(kernel, entry, arch), place))
            step()
    return rows


def _row(kernel: Kernel, entry: Entry, arch: str, made: Build | BuildError, place: Path) -> KernelRow:
    if isinstance(made, BuildError):
        return KernelRow(kernel.name, entry.name, arch, failure=str(made))
    role = entry.name.removeprefix(kernel.name).strip("_")
    stem = f"{role}.{arch}" if role else arch
    contents = {f"{stem}.{made.extension}": made.binary, f"{stem}.{made.assembly_extension}": made.assembly.encode()}
    for name, data in contents.items():
        (place / name).write_bytes(data)
    files = {f"{kernel.name}/{name}": hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    found = made.resources
    return KernelRow(
        kernel.name, entry.name, arch, found.config, found.registers, found.shared, found.spilled,
        found.matrix_instructions, files,
    )  # fmt: skip


def _described(kernel: Kernel) -> dict[str, Any]:
    """How a kernel is called: its operands, and the parameters of each function in order."""
    return {
        "name": kernel.name,
        "operands": kernel.operands,
        "source_sha256": hashlib.sha256(kernel.source.encode()).hexdigest(),
        "functions": [
            {"name": entry.name, "sizes": entry.sizes, "parameters": [asdict(held) for held in entry.parameters]}
            for entry in kernel.entries
        ],
    }
