"""``python -m bench.aot``: every kernel of the catalogue, built for every architecture on a machine without a GPU.

A row is one function of one kernel (``codegen/triton/catalogue.py``) with its default configuration for one
architecture: registers a thread, bytes of shared memory a program, bytes a thread spills to memory, and how often the
matrix unit is named (mma on sm_80, wgmma on sm_90, tcgen05 on sm_100, mfma on gfx942). A row passes when it builds,
spills nothing and, for attention of many queries in 16 bit with heads of 64 or 128 on sm_90, uses wgmma.
Exit status 1 when one does not. ``--json`` writes the record. Builds are kept in Triton's cache.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.timing import RESULTS, write_record
from regraft.codegen.triton.attention_configs import ARCHS
from regraft.codegen.triton.build import Build, BuildError, try_build
from regraft.codegen.triton.catalogue import FAMILIES, Sample, samples
from regraft.codegen.triton.emit import Entry, Kernel

_WANTS_WGMMA = re.compile(r"prefill (b?float16) (64|128)\b")


@dataclass(frozen=True)
class Row:
    """One function of a kernel on one architecture, and why it fails, if it does."""

    family: str
    name: str
    entry: str
    arch: str
    config: tuple[int, ...]
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    matrix_instructions: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


def row_of(sample: Sample, kernel: Kernel, entry: Entry, arch: str, made: Build | BuildError) -> Row:
    """What a build gave, judged."""
    role = entry.name.removeprefix(kernel.name).strip("_") or "main"
    if isinstance(made, BuildError):
        return Row(sample.family, sample.name, role, arch, entry.configs.get(arch, ()), failure=str(made))
    found = made.resources
    failure = None
    if found.spilled:
        failure = f"spills {found.spilled} bytes a thread"
    elif wants_wgmma(sample, arch) and role == "main" and not found.matrix_instructions.get("wgmma"):
        failure = "does not use wgmma"
    return Row(
        sample.family, sample.name, role, arch, found.config, found.registers, found.shared, found.spilled,
        found.matrix_instructions, failure,
    )  # fmt: skip


def wants_wgmma(sample: Sample, arch: str) -> bool:
    """Whether a sample must use Hopper's matrix unit."""
    return arch == "sm_90" and sample.family == "attention" and _WANTS_WGMMA.match(sample.name) is not None


def measure(chosen: Sequence[Sample], archs: Sequence[str], executor: Executor, quiet: bool = True) -> list[Row]:
    """Build all of the samples, in order."""
    emitted = [(sample, sample.emit()) for sample in chosen]
    jobs = [(sample, kernel, entry, arch) for sample, kernel in emitted for entry in kernel.entries for arch in archs]
    waiting = [(job, executor.submit(try_build, *job[1:])) for job in jobs]
    console = Console(stderr=True, quiet=quiet)
    return [row_of(*job, future.result()) for job, future in track(waiting, "building", console=console)]


def show(rows: Sequence[Row]) -> Table:
    """A line a function; for each architecture registers, KiB of shared memory, and what it spills."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    table = Table(title="registers a thread / KiB of shared memory a program / bytes spilled a thread")
    for column in ("family", "kernel", "function", *archs):
        table.add_column(column)
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((row.family, row.name, row.entry), {})[row.arch] = row
    for key, by_arch in grouped.items():
        table.add_row(*key, *(_cell(by_arch[arch]) if arch in by_arch else "" for arch in archs))
    return table


def _cell(row: Row) -> str:
    units = "".join(f" {name}" for name in row.matrix_instructions)
    figures = f"{row.registers} / {row.shared / 1024:.0f} / {row.spilled}{units}"
    return figures if row.failure is None else f"{figures} FAILS: {row.failure}"


def main() -> int:
    """Build, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default=None, help="only this family of kernels")
    parser.add_argument("--match", default="", help="only kernels whose name holds this text")
    parser.add_argument("--arch", default=",".join(ARCHS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that build")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "aot.json", default=None, help="the record")
    options = parser.parse_args()
    chosen = [sample for sample in samples(options.family) if options.match in sample.name]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as executor:
        rows = measure(chosen, options.arch.split(","), executor, quiet=not sys.stderr.isatty())
    failed = [row for row in rows if row.failure is not None]
    Console(width=200).print(show(rows))
    for row in failed:
        print(f"{row.family} {row.name} {row.entry} {row.arch} {row.config}: {row.failure}")
    print(f"{len(rows) - len(failed)} of {len(rows)} builds pass ({len(chosen)} kernels)")
    if options.json is not None:
        write_record("aot", summary(rows), options.json)
    return 1 if failed or not rows else 0


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The record: totals by architecture, and every row."""
    totals = {
        arch: {
            "builds": len(found),
            "failed": sum(row.failure is not None for row in found),
            "spilled": sum(row.spilled > 0 for row in found),
            "most_registers": max(row.registers for row in found),
            "most_shared": max(row.shared for row in found),
        }
        for arch in dict.fromkeys(row.arch for row in rows)
        for found in [[row for row in rows if row.arch == arch]]
    }
    return {"totals": totals, "rows": [asdict(row) for row in rows]}


if __name__ == "__main__":
    sys.exit(main())
