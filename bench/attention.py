"""``python -m bench.attention --device cpu``: masked attention beside SDPA, FlexAttention and eager PyTorch.

Each variant is regraft's operator, lowered to the device; the peers are PyTorch's SDPA with its own flag or a dense
additive mask, FlexAttention compiled, and the formula written out. Masks of the peers are made beforehand, and are not
timed. Calls are made in turn; what is shown are medians in milliseconds, the best peer's time over regraft's, that of
SDPA with a dense mask over regraft's, and the memory that a call of regraft adds, above operands and result. The
error is the largest of eight runs of eight rows against the formula in fp64. A peer that does not fit in memory, or
that cannot compute the variant, is left out with its reason. With ``--json`` what is measured replaces what the record
holds of the same variant and length. Exit status 1 when an output is off.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.attention_cases import (
    HEADS,
    SIZE,
    VARIANTS,
    Site,
    Variant,
    additive,
    dense,
    operands,
    score_mod,
    written_out,
)
from bench.cold import PeakMemory
from bench.timing import time_in_turn, write_record

LENGTHS = (1024, 4096, 16384)
PEERS = ("sdpa flag", "sdpa mask", "flex", "eager")
TOLERANCE = 1e-5
_ROUNDS = {1024: 11, 4096: 5, 16384: 3}
_MASK_COPIES = 2.5  # of the dense mask that SDPA with one holds at once: ours, its own, a row's scores
_EAGER_COPIES = 3.5  # of the scores that the formula written out holds at once


@dataclass
class Row:
    """One variant at one length. Milliseconds by name; ``memory`` in MB beyond operands and result."""

    variant: str
    length: int
    milliseconds: dict[str, float]
    error: float
    memory: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def best_peer(self) -> float:
        """The best peer's time over regraft's."""
        peers = [time for name, time in self.milliseconds.items() if name != "regraft"]
        if "regraft" not in self.milliseconds:
            return float("nan")
        return min(peers) / self.milliseconds["regraft"] if peers else float("nan")

    @property
    def passed(self) -> bool:
        """Whether the numbers are right; speed is for the reader to judge, on a quiet machine."""
        return self.error <= TOLERANCE


def memory_of(variant: Variant, length: int) -> float:
    """The MB that a first call adds to a process of its own, beyond operands and result. Another call of the same kind
    has brought the code there. What capturing freed may be used again, so that small needs show as less or nothing."""
    command = [sys.executable, "-m", "bench.attention", "--memory-of", variant.name, "--lengths", str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _memory_here(variant: Variant, length: int) -> float:
    small = operands(64)
    _regraft(variant, 64, small)()
    given = operands(length)
    call = _regraft(variant, length, given)
    with PeakMemory() as memory:
        out = call()
    return max(0.0, memory.added - out.nbytes) / 1e6


def measure(variant: Variant, length: int, peers: tuple[str, ...], rounds: int | None) -> Row:
    """Build all, check regraft's numbers, time in turn."""
    given = operands(length)
    left_out: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {"regraft": _regraft(variant, length, given)}
    out = calls["regraft"]()
    for name in peers:
        made = _PEERS[name](variant, length, given)
        if isinstance(made, str):
            if made:
                left_out[name] = made
        else:
            calls[name] = made
    with torch.no_grad():
        times = time_in_turn(calls, rounds=rounds or _ROUNDS.get(length, 5), warm_up=1)
    milliseconds = {name: round(timing.median, 3) for name, timing in times.items()}
    return Row(variant.name, length, milliseconds, _error(variant, length, given, out), left_out=left_out)


def _regraft(variant: Variant, length: int, given: list[Tensor]) -> Callable[[], Tensor]:
    from regraft.codegen.cpu.lower import lower
    from regraft.ir.capture import capture

    executable = lower(capture(Site(variant, length), tuple(given)))
    return lambda: executable(*given)[0]  # type: ignore[no-any-return]


def _sdpa_flag(variant: Variant, length: int, given: list[Tensor]) -> Callable[[], Tensor] | str:
    if variant.sdpa != "flag":
        return ""
    causal = variant.name == "causal"
    return lambda: torch.nn.functional.scaled_dot_product_attention(*given, is_causal=causal)


def _sdpa_mask(variant: Variant, length: int, given: list[Tensor]) -> Callable[[], Tensor] | str:
    if not variant.sdpa or variant.name == "no mask":
        return "" if variant.sdpa else "SDPA cannot compute it"
    heads = HEADS if variant.per_head or variant.slopes else 1
    if not _fits(_MASK_COPIES * heads * length**2 * 4):
        return "its mask does not fit in memory"
    mask = additive(variant, length)
    return lambda: torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask)


def _flex(variant: Variant, length: int, given: list[Tensor]) -> Callable[[], Tensor] | str:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if variant.weight != "softmax":
        return "FlexAttention has no weights but a softmax"
    torch._dynamo.reset()
    blocks = None
    if variant.name != "no mask":
        heads = HEADS if variant.per_head else None
        blocks = create_block_mask(variant.visible(length), None, heads, length, length, device="cpu")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    change = score_mod(variant)
    try:
        with torch.no_grad():
            compiled(*given, score_mod=change, block_mask=blocks)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return lambda: compiled(*given, score_mod=change, block_mask=blocks)  # type: ignore[no-any-return]


def _eager(variant: Variant, length: int, given: list[Tensor]) -> Callable[[], Tensor] | str:
    if not _fits(_EAGER_COPIES * HEADS * length**2 * 4):
        return "its scores do not fit in memory"
    seen = dense(variant, length)
    return lambda: written_out(variant, given[0], given[1], given[2], seen, slice(None))


_PEERS: dict[str, Callable[[Variant, int, list[Tensor]], Callable[[], Tensor] | str]] = {
    "sdpa flag": _sdpa_flag,
    "sdpa mask": _sdpa_mask,
    "flex": _flex,
    "eager": _eager,
}


def _fits(size: float) -> bool:
    """Whether so many bytes are free, and others are left some."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return size < 0.5 * available


def _error(variant: Variant, length: int, given: list[Tensor], out: Tensor) -> float:
    worst = 0.0
    visible, key = variant.visible(length), torch.arange(length)
    head = torch.arange(HEADS)[:, None, None]
    for start in range(0, length, max(1, length // 8)):
        rows = slice(start, min(start + 8, length))
        seen = visible(torch.zeros(()), head, torch.arange(length)[rows, None], key)
        seen = torch.broadcast_to(seen, (1, HEADS, rows.stop - rows.start, length))
        wanted = written_out(variant, *(tensor.double() for tensor in given), seen, rows)  # type: ignore[misc]
        worst = max(worst, float((out[:, :, rows] - wanted).norm() / wanted.norm()))
    return worst


def show(rows: list[Row]) -> Table:
    """All rows: milliseconds, ratios, memory."""
    table = Table(title=f"attention, fp32, {HEADS} heads of {SIZE}, {torch.get_num_threads()} threads (milliseconds)")
    for column in ("variant", "length", "regraft", *PEERS, "best peer", "dense mask", "error", ""):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        times = [f"{row.milliseconds[name]:.1f}" if name in row.milliseconds else "-" for name in ("regraft", *PEERS)]
        masked = row.milliseconds.get("sdpa mask")
        ratio = "-" if masked is None else f"{masked / row.milliseconds['regraft']:.2f}"
        verdict = "ok" if row.passed else "WRONG"
        table.add_row(
            row.variant, str(row.length), *times, f"{row.best_peer:.2f}", ratio, f"{row.error:.0e}", verdict,
        )  # fmt: skip
    return table


def growth(rows: list[Row]) -> Table:
    """Memory of a call by length: linear is four times as much at four times the length."""
    lengths = sorted({row.length for row in rows})
    table = Table(title="memory of a call beyond operands and result (MB)")
    table.add_column("variant")
    for length in lengths:
        table.add_column(str(length), justify="right")
    table.add_column("last / one before", justify="right")
    for name in dict.fromkeys(row.variant for row in rows):
        found = {row.length: row.memory for row in rows if row.variant == name}
        values = [found.get(length) for length in lengths]
        known = [value for value in values if value is not None]
        ratio = f"{known[-1] / known[-2]:.1f}" if len(known) > 1 and known[-2] > 0 else "-"
        table.add_row(name, *("-" if value is None else f"{value:.1f}" for value in values), ratio)
    return table


def record(rows: list[Row], path: Path) -> None:
    """Write the rows, and what earlier runs measured that this one did not."""
    before: dict[tuple[str, int], dict[str, Any]] = {}
    runs: list[str] = []
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        before = {(row["variant"], row["length"]): row for row in known["rows"]}
        runs = known["runs"]
    for row in rows:
        new = {name: value for name, value in asdict(row).items() if value not in (None, {})}
        if row.milliseconds:
            ratio = None if math.isnan(row.best_peer) else round(row.best_peer, 3)
            new |= {"best_peer": ratio, "left_out": row.left_out}
        else:
            del new["error"]
        before[row.variant, row.length] = {**before.get((row.variant, row.length), {}), **new}
    entries = list(before.values())
    order = {variant.name: place for place, variant in enumerate(VARIANTS)}
    entries.sort(key=lambda row: (order.get(row["variant"], len(order)), row["length"]))
    runs = list(dict.fromkeys([*runs, f"python -m bench.attention {shlex.join(sys.argv[1:])}"]))
    write_record(
        "attention", {"heads": HEADS, "head_dim": SIZE, "dtype": "float32", "runs": runs, "rows": entries}, path
    )


def _chosen(parts: list[str]) -> list[Variant]:
    """The variants of these names; a part of a name stands for all that hold it."""
    names = {variant.name for variant in VARIANTS}
    found = {variant for variant in VARIANTS for part in parts if part in variant.name and part not in names}
    return [variant for variant in VARIANTS if not parts or variant in found or variant.name in parts]


def main() -> int:
    """Measure, print, and with ``--json`` record; exit status 1 when an output is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu",))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--variants", default="", help="names or parts of them, with ; between; all without it")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--parts", default="time,memory", help="time, memory or both")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    logging.getLogger("regraft").setLevel(logging.ERROR)
    if options.memory_of:
        print(_memory_here(next(v for v in VARIANTS if v.name == options.memory_of), int(options.lengths)))
        return 0
    chosen = _chosen([part.strip() for part in options.variants.split(";") if part.strip()])
    rows: list[Row] = []
    console = Console(width=150)
    for variant in chosen:
        for length in map(int, options.lengths.split(",")):
            row = Row(variant.name, length, {}, 0.0)
            if "time" in options.parts:
                row = measure(variant, length, tuple(options.peers.split(",")), options.rounds)
            if "memory" in options.parts:
                row.memory = round(memory_of(variant, length), 1)
            rows.append(row)
            if options.json is not None:  # row by row: a run that is cut off keeps what it measured
                record([row], options.json)
            times = ", ".join(f"{name} {time:.1f}" for name, time in rows[-1].milliseconds.items())
            console.print(f"{variant.name}, {length}: {times}", markup=False, highlight=False)
    if "time" in options.parts:
        console.print(show(rows))
    if "memory" in options.parts:
        console.print(growth(rows))
    for reason in dict.fromkeys(f"{r.length}, {name}: {why}" for r in rows for name, why in r.left_out.items()):
        console.print(f"left out at {reason}", markup=False, highlight=False)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
