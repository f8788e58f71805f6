"""``python -m bench.scaling``: how compiling grows with depth, and what it holds in memory.

For a plain decoder and for Hugging Face's llama (eager attention), of width 64, at several depths: seconds of
capture, passes (with every rewrite checked, and with none checked), lowering and the final comparison, medians of
three compiles. A row's ratio is the deepest model over the shallowest. Memory is measured in a fresh process, on a
model with more than 200 MB of weights: the highest resident memory during the compile, the model itself included, as a
multiple of its weights.
Targets: a ratio of at most 12 for ten times the layers, 20 s for 100 layers, 2.2 times the weights.
Exit status 1 when one is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.cold import PeakMemory
from bench.decoder import PlainDecoder
from bench.models import Prefill
from bench.timing import write_record

DEPTHS = (10, 30, 100)
COMPILES = 3
LARGEST_RATIO, LARGEST_SECONDS, LARGEST_MEMORY = 12.0, 20.0, 2.2


def plain_decoder(layers: int) -> nn.Module:
    """Hidden 64, SDPA."""
    torch.manual_seed(0)
    return PlainDecoder(layers).eval()


def llama(layers: int) -> nn.Module:
    """Hidden 64, attention written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return Prefill(LlamaForCausalLM(config)).eval()


MODELS: dict[str, Callable[[int], nn.Module]] = {"plain": plain_decoder, "llama": llama}


def typical_phases(model: nn.Module, verify: str) -> dict[str, float]:
    """Medians of a few compiles, phase by phase: a single short one is at the mercy of the machine's other work."""
    runs = [phases(model, verify) for _ in range(COMPILES)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def phases(model: nn.Module, verify: str) -> dict[str, float]:
    """Seconds of one compile by phase: capture, passes, lowering, verification, and total."""
    import regraft

    gc.collect()
    tokens = torch.arange(2 * 16).reshape(2, 16)
    started = time.perf_counter()
    fast = regraft.compile(model, tokens, verify=verify)
    total = time.perf_counter() - started
    report = fast._report  # the property would measure the processor, which no compile does
    if not fast.entries:
        raise RuntimeError(f"nothing was compiled: {[event.reason for event in report.events]}")
    named = ("capture", "lowering", "verification")
    split = {name: report.phases.get(name, 0.0) for name in named}
    split["passes"] = sum(seconds for name, seconds in report.phases.items() if name not in named)
    return {**split, "total": total}


def measure(models: list[str], depths: list[int]) -> list[dict[str, Any]]:
    """One row a model, depth and kind of check."""
    phases(plain_decoder(1), "each")  # what is imported and set up once is no cost of depth
    return [
        {"model": name, "layers": depth, "verify": verify, **typical_phases(MODELS[name](depth), verify)}
        for name in models
        for depth in depths
        for verify in ("off", "each")
    ]


def ratios(rows: list[dict[str, Any]], depths: list[int]) -> list[dict[str, Any]]:
    """For each model and kind of check: the deepest row over the shallowest, for the passes and in total."""
    found = []
    for first in (row for row in rows if row["layers"] == depths[0]):
        same = [row for row in rows if (row["model"], row["verify"]) == (first["model"], first["verify"])]
        last = next(row for row in same if row["layers"] == depths[-1])
        found.append(
            {
                "model": first["model"],
                "verify": first["verify"],
                "passes": last["passes"] / first["passes"],
                "total": last["total"] / first["total"],
                "deepest_seconds": last["total"],
            }
        )
    return found


def memory() -> dict[str, float]:
    """Peak of a compile of a decoder with eight layers of width 1024, in this process."""
    import regraft

    torch.manual_seed(0)
    regraft.compile(PlainDecoder(1).eval(), torch.zeros(1, 16, dtype=torch.int64))  # imports, threads, allocator
    model = PlainDecoder(8, hidden=1024, heads=8, kv_heads=8, inner=2816).eval()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    gc.collect()
    with PeakMemory() as peak:
        fast = regraft.compile(model, torch.zeros(1, 64, dtype=torch.int64))
    assert fast.entries
    return {"weight_bytes": weights, "peak_bytes": peak.added, "multiple": (weights + peak.added) / weights}


def memory_elsewhere() -> dict[str, float]:
    """:func:`memory` in a fresh process."""
    command = [sys.executable, "-m", "bench.scaling", "--memory-here"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(rows: list[dict[str, Any]]) -> Table:
    """Seconds by phase."""
    names = ("capture", "passes", "lowering", "verification", "total")
    table = Table(title="seconds of a compile")
    for column in ("model", "layers", "verify", *names):
        table.add_column(column)
    for row in rows:
        table.add_row(row["model"], str(row["layers"]), row["verify"], *(f"{row[name]:.2f}" for name in names))
    return table


def main() -> int:
    """Measure, print, and with ``--json`` record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="plain,llama")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    parser.add_argument("--no-memory", action="store_true", help="leave the memory of a large compile out")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    logging.getLogger("regraft").setLevel(logging.ERROR)
    if options.memory_here:
        print(json.dumps(memory()))
        return 0
    depths = sorted(map(int, options.depths.split(",")))
    rows = measure(options.models.split(","), depths)
    Console(width=120).print(show(rows))
    grown = ratios(rows, depths)
    allowed = LARGEST_RATIO * depths[-1] / depths[0] / 10
    missed = []
    for row in grown:
        label = f"{row['model']}, verify={row['verify']}"
        print(
            f"{label}: {depths[-1]} layers over {depths[0]}: passes {row['passes']:.1f}x, "
            f"all {row['total']:.1f}x (at most {allowed:.0f}x); {row['deepest_seconds']:.1f} s"
        )
        if max(row["passes"], row["total"]) > allowed or row["deepest_seconds"] > LARGEST_SECONDS:
            missed.append(label)
    results: dict[str, Any] = {"rows": rows, "ratios": grown}
    if not options.no_memory:
        results["memory"] = memory_elsewhere()
        print(f"peak memory of a compile: {results['memory']['multiple']:.2f}x the weights")
        if results["memory"]["multiple"] > LARGEST_MEMORY:
            missed.append("memory")
    print(f"missed: {'; '.join(missed)}" if missed else "all targets are met")
    if options.json is not None:
        write_record("scaling", results, options.json)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
