"""``make gpu``: kernels and models on this machine's GPU, with PyTorch and without a network, in at most 8 minutes.

Parts: "tests" (numbers of every attention kernel, bf16 among them), "attention", "decode" and "models". Each runs in a
process of its own for as long as it may, and writes ``gpu_<part>.json`` after every row; what a file of the same device
holds already is not measured again, so that a run that was cut off goes on. ``make gpu PART=attention`` runs one part,
``OUT=folder`` names where records go. ``python -m bench.gpu --device cpu`` rehearses all of it at tiny sizes: its
times mean nothing. Exit status 1 when a row failed or is missing, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_attention import ATTENTION
from bench.gpu_decode import DECODE
from bench.gpu_models import MODELS_PART
from bench.gpu_rows import Part, Setting, run_part
from bench.gpu_tests import TESTS
from bench.timing import RESULTS

#: Part -> its rows. A further part adds a line.
PARTS: dict[str, Part] = {part.name: part for part in (TESTS, ATTENTION, DECODE, MODELS_PART)}


def record_path(out: Path, part: str) -> Path:
    """Where a part's record is."""
    return out / f"gpu_{part}.json"


def show(record: dict[str, Any]) -> Table:
    """A part's rows: figures, and whether the target was met."""
    left = "" if record["complete"] else " (cut off: run it again to go on)"
    table = Table(title=f"{record['part']} on {record['setting']['gpu'] or 'a CPU, rehearsed'}{left}")
    for column in ("row", "figures", "target", ""):
        table.add_column(column)
    verdicts = {True: "ok", False: "FAILS", None: "-"}
    for label, row in record["rows"].items():
        figures = ", ".join(f"{name} {_shown(value)}" for name, value in row["figures"].items())
        table.add_row(label, figures, row["target"], verdicts[row["passed"]])
    return table


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _spawn(part: Part, options: argparse.Namespace) -> None:
    """Run a part in a process of its own, for as long as it may."""
    command = [sys.executable, "-m", "bench.gpu", "--part", part.name, "--here", "--out", str(options.out)]
    command += ["--device", options.device, *(["--again"] if options.again else [])]
    try:
        subprocess.run(command, timeout=part.seconds if options.device != "cpu" else None, check=False)
    except subprocess.TimeoutExpired:
        print(f"{part.name}: cut off after {part.seconds:.0f} s; what was measured is kept", file=sys.stderr)


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
    """Run the parts, print one table each, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default=None)
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" to rehearse at tiny sizes')
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the records")
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
    for part in chosen:
        _spawn(part, options)
    records = [_record(record_path(options.out, part.name)) for part in chosen]
    for record in records:
        if record is not None:
            Console(width=180).print(show(record))
    return verdict(records)


if __name__ == "__main__":
    sys.exit(main())
