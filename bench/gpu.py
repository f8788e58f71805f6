"""``make gpu``: kernels and models on this machine's GPU, with PyTorch and without a network, in at most 8 minutes.

Parts: "tests" (numbers of kernels, bf16 among them), "attention", "decode", "norms", "moe", "tokens" and "models". Each
runs in a process of its own for as long as it may, and what one does not use, the next ones have. A part writes
``gpu_<part>.json`` after every row; what a file of the same device holds already is not measured again, so that a run
that was cut off goes on. ``make gpu PART=attention`` runs one part, ``MINUTES=25`` gives all of them more time,
``OUT=folder`` names where records go; ``gpu_targets.json`` there says which targets are met. ``python -m bench.gpu
--device cpu`` rehearses all of it at tiny sizes: its times mean nothing. Exit status 1 when a row failed or is missing,
2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_attention import ATTENTION
from bench.gpu_decode import DECODE
from bench.gpu_models import MODELS_PART
from bench.gpu_moe import MOE
from bench.gpu_norms import NORMS
from bench.gpu_rows import Part, Setting, run_part
from bench.gpu_targets import show as show_targets
from bench.gpu_targets import to_json, verdicts
from bench.gpu_tests import TESTS
from bench.gpu_tokens import TOKENS
from bench.timing import RESULTS, write_record

#: Part -> its rows. A further part adds a line.
PARTS: dict[str, Part] = {part.name: part for part in (TESTS, ATTENTION, DECODE, NORMS, MOE, TOKENS, MODELS_PART)}
#: The time that the parts' own seconds are shares of.
MINUTES = 8.0


def record_path(out: Path, part: str) -> Path:
    """Where a part's record is."""
    return out / f"gpu_{part}.json"


def show(records: Sequence[dict[str, Any] | None]) -> Table:
    """The rows of all parts: figures, what is missing and why, and whether the target was met."""
    table = Table(title="what was measured")
    for column in ("part", "row", "figures", "target", ""):
        table.add_column(column)
    words = {True: "ok", False: "FAILS", None: "-"}
    for record in records:
        if record is None:
            continue
        where = f"{record['part']} on {record['setting']['gpu'] or 'a CPU, rehearsed'}"
        for label, row in record["rows"].items():
            figures = [f"{name} {_shown(value)}" for name, value in row["figures"].items()]
            figures += [f"without {name} ({reason})" for name, reason in row["left_out"].items()]
            table.add_row(where, label, ", ".join(figures), row["target"], words[row["passed"]])
        for label in record["missing"]:
            table.add_row(where, label, "not measured: the part was cut off; run it again to go on", "", "-")
        table.add_section()
    return table


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _spawn(part: Part, options: argparse.Namespace, seconds: float) -> float:
    """Run a part in a process of its own, for as long as it may; returns the seconds that it took."""
    command = [sys.executable, "-m", "bench.gpu", "--part", part.name, "--here", "--out", str(options.out)]
    command += ["--device", options.device, *(["--again"] if options.again else [])]
    started = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(seconds if options.device != "cpu" else None)
    except subprocess.TimeoutExpired:
        print(f"{part.name}: cut off after {seconds:.0f} s; what was measured is kept", file=sys.stderr)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that its rows have, which hold the device
            process.wait()
    return time.monotonic() - started


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def verdict(records: Sequence[dict[str, Any] | None]) -> int:
    """The exit status: 0 when every row of every part was measured and none failed."""
    whole = all(record is not None and record["complete"] for record in records)
    failed = any(row["passed"] is False for record in records if record for row in record["rows"].values())
    return 0 if whole and not failed else 1


def main() -> int:
    """Run the parts, print what was measured and which targets are met, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default=None)
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" to rehearse at tiny sizes')
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what all parts together may take")
    parser.add_argument("--again", action="store_true", help="measure also what a record holds already")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"PyTorch finds no device {options.device!r} here; --device cpu rehearses this bench without one")
        return 2
    chosen = [PARTS[options.part]] if options.part else list(PARTS.values())
    if options.here:
        setting = Setting(options.device, tiny=options.device == "cpu")
        run_part(chosen[0], setting, record_path(options.out, chosen[0].name), options.again)
        return 0
    left = 0.0
    for part in chosen:
        allowed = part.seconds * options.minutes / MINUTES + left
        left = allowed - _spawn(part, options, allowed)
    records = [_record(record_path(options.out, part.name)) for part in chosen]
    _report(records, options.out)
    return verdict(records)


def _report(records: Sequence[dict[str, Any] | None], out: Path) -> None:
    """Print what was measured and what it says of the targets; of parts that did not run now, their record counts."""
    known = {record["part"]: record for record in (_record(record_path(out, name)) for name in PARTS) if record}
    found = verdicts(list(known.values()))
    console = Console(width=180)
    console.print(show(records))
    console.print(show_targets(found))
    write_record("gpu", {"targets": to_json(found)}, out / "gpu_targets.json")


if __name__ == "__main__":
    sys.exit(main())
