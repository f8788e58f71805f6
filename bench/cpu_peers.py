"""regraft beside eager, torch.compile, ONNX Runtime and OpenVINO on the CPU.

    python -m bench.cpu_peers [--rows minilm-1x32 …] [--peers …] [--rounds 15] [--threads 2] [--json PATH]

Times come from calls made in turn in this process. Cold compile seconds and memory come from a fresh process each,
with empty compiler caches. Memory is given for `free_original=True`, where compiled code takes the place of the model,
and for a model that stays beside it; for this also without what a compiler's own code takes, and beside that of one
call of the original model, which every compile that compares outputs makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.models import ROWS
from bench.peers import FREED, PEERS, Built, build
from bench.timing import time_in_turn, write_record

COLD = ("torch.compile", "torch.compile max", "onnxruntime", "openvino", "regraft")
"""Peers whose compile seconds are measured in a fresh process; eager has none."""
LOADED = ("eager", "regraft")
"""Those whose memory is also measured with their code loaded before."""


MEMORY = ("freed_peak_over_weights", "peak_over_weights", "loaded_peak_over_weights", "eager_peak_over_weights")
"""Keys of a row's record: highest memory as a multiple of the weights."""


def measure_row(row: str, peers: list[str], rounds: int, alone: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Build every peer on one row, time them in turn, and return the row's record. ``alone`` are what cold compiles
    of the peers took."""
    case = ROWS[row]()
    built: dict[str, Built] = {name: build(name, case) for name in peers}
    calls = {name: result.call for name, result in built.items() if result.call is not None}
    times = time_in_turn(calls, rounds=rounds)
    record: dict[str, Any] = {"row": row, "peers": {}}
    for name in peers:
        entry: dict[str, Any] = {}
        if name in times:
            entry = {"milliseconds": round(times[name].median, 3), "drift": built[name].drift}
        else:
            entry = {"reason": built[name].reason}
        record["peers"][name] = entry | (alone.get(name, {}) if name in times else {})
    return record | summarize(record["peers"])


def compiles_alone(row: str, peer: str, threads: int) -> dict[str, Any]:
    """Seconds and memory of a peer's compile in processes of its own, by how it is made."""
    made = {}
    if peer in COLD:
        made["cold"] = cold_build(row, peer, threads)
    if peer in LOADED:
        made["loaded"] = cold_build(row, peer, threads, "--loaded")
    if peer == "regraft":
        made["freed"] = cold_build(row, FREED, threads)
    return made


def summarize(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare regraft with the fastest peer and with torch.compile; above 1, regraft is faster."""
    times = {name: entry["milliseconds"] for name, entry in entries.items() if "milliseconds" in entry}
    own = times.pop("regraft", None)
    if not times:
        return {}
    best = min(times, key=lambda name: times[name])
    summary: dict[str, Any] = {"best_peer": best}
    if own is None:
        return summary
    summary["speedup_over_best"] = times[best] / own
    if "torch.compile" in times:
        summary["speedup_over_torch_compile"] = times["torch.compile"] / own
    own_cold = entries["regraft"].get("cold", {})
    peer_cold = entries.get("torch.compile", {}).get("cold", {})
    if "seconds" in own_cold and "seconds" in peer_cold:
        summary["compile_ratio"] = own_cold["seconds"] / peer_cold["seconds"]
    if "peak_over_weights" in own_cold:
        summary["peak_over_weights"] = own_cold["peak_over_weights"]
    for name, how, key in (
        ("regraft", "freed", "freed_peak_over_weights"),
        ("regraft", "loaded", "loaded_peak_over_weights"),
        ("eager", "loaded", "eager_peak_over_weights"),
    ):
        if "peak_over_weights" in entries.get(name, {}).get(how, {}):
            summary[key] = entries[name][how]["peak_over_weights"]
    return summary


def cold_build(row: str, peer: str, threads: int, *more: str) -> dict[str, Any]:
    """Build one peer in a fresh process with empty caches; return its seconds and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "REGRAFT_CACHE_DIR": folder}
        environment = dict(os.environ, **caches, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
        command = [sys.executable, "-m", "bench.cold", row, peer, "--threads", str(threads), *more]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"reason": last[0][:160]}


def overall(records: list[dict[str, Any]]) -> dict[str, float]:
    """The geometric means over the rows of each speed-up that all the rows' records hold."""
    means: dict[str, float] = {}
    for key in ("speedup_over_best", "speedup_over_torch_compile", "compile_ratio"):
        values = [record[key] for record in records if key in record]
        if values:
            means[key] = geometric_mean(values)
    return means


def show(records: list[dict[str, Any]], peers: list[str], console: Console) -> None:
    """Print the table of medians and ratios, the compile table, and the reasons of the peers that failed."""
    speed = Table(title="median ms (ratio above 1: regraft is faster)")
    build_table = Table(title="cold compile, seconds (ratio below 1: regraft compiles faster)")
    speed.add_column("row", no_wrap=True)
    build_table.add_column("row", no_wrap=True)
    for peer in peers:
        speed.add_column(peer, justify="right")
    for peer in (name for name in peers if name in COLD):
        build_table.add_column(peer, justify="right")
    for heading in ("best peer", "best / regraft", "torch.compile / regraft"):
        speed.add_column(heading, justify="right")
    for heading in ("regraft / torch.compile", "peak memory / weights, freed", "kept", "code aside", "one eager call"):
        build_table.add_column(heading, justify="right")
    for record in records:
        entries = record["peers"]
        speed.add_row(
            record["row"],
            *(_number(entries[peer].get("milliseconds")) for peer in peers),
            record.get("best_peer", "-"),
            _number(record.get("speedup_over_best")),
            _number(record.get("speedup_over_torch_compile")),
        )
        build_table.add_row(
            record["row"],
            *(_number(entries[peer].get("cold", {}).get("seconds")) for peer in peers if peer in COLD),
            _number(record.get("compile_ratio")),
            *(_number(record.get(key)) for key in MEMORY),
        )
    console.print(speed)
    if any("cold" in entry for record in records for entry in record["peers"].values()):
        console.print(build_table)
    for record in records:
        for peer, entry in record["peers"].items():
            reason = entry.get("reason") or entry.get("cold", {}).get("reason")
            if reason:
                console.print(f"{record['row']}: {peer} did not run: {reason}", markup=False)
    for key, value in overall(records).items():
        console.print(f"geometric mean of {key.replace('_', ' ')}: {value:.3f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen rows, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-cold", action="store_true", help="do not measure compile time and memory")
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=170)
    records = []
    alone: dict[str, dict[str, dict[str, Any]]] = {}
    # Cold compiles come first: pages of a checkpoint that this process had mapped, too, would stay in memory there.
    for row in [] if options.skip_cold else options.rows:
        with console.status(f"compiling {row}"):
            alone[row] = {name: compiles_alone(row, name, options.threads) for name in options.peers}
    for row in options.rows:
        with console.status(f"measuring {row}"):
            records.append(measure_row(row, options.peers, options.rounds, alone.get(row, {})))
        show(records[-1:], options.peers, console)
    if len(records) > 1:
        show(records, options.peers, console)
    path = write_record("cpu_peers", {"rows": records, "overall": overall(records)}, options.json)
    console.print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
