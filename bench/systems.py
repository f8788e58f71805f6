"""``python -m bench.systems``: every system of ``docs/systems.md`` beside its peers on this machine's CPU.

Peers: the formula in eager PyTorch, the same through ``torch.compile``, and, where the attention is a softmax, the
model with SDPA and the mask as a tensor, and with compiled FlexAttention, whose block masks are made beforehand. Calls
are made in turn; what is shown are medians in milliseconds, the best peer's time over regraft's, and regraft's relative
L2 error against the formula in fp64. ``--part lossy`` measures the lossy passes, each with one knob, beside the
unreduced model: the time of that over its own, and the error against it. With ``--json`` what is measured replaces what
the record holds of the same system. Exit status 1 when an exact output is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.systems_cases import CASES, Case, attend_sdpa, attend_written_out, attending
from bench.systems_lossy import LOSSY, Reduction, programs
from bench.timing import time_in_turn, write_record

PEERS = ("eager", "torch.compile", "sdpa", "flex")
TOLERANCE = 1e-5
Call = Callable[[], Any]


@dataclass
class Row:
    """One system: medians by name, regraft's error, what the rewrites promise; ``left_out`` are peers with reasons."""

    system: str
    milliseconds: dict[str, float]
    error: float
    exactness: str
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def best_peer(self) -> float:
        """The best peer's time over regraft's."""
        return min(time for name, time in self.milliseconds.items() if name != "regraft") / self.milliseconds["regraft"]

    @property
    def passed(self) -> bool:
        """Whether the numbers are right; those of a lossy pass are for the reader to judge."""
        return self.exactness == "lossy" or self.error <= TOLERANCE


def measure(name: str, case: Case, rounds: int) -> Row:
    """Build all, check regraft's numbers, time in turn."""
    import regraft

    torch.manual_seed(0)
    model, args = case.make().eval(), case.args()
    fast = regraft.compile(model, args)
    calls: dict[str, Call] = {"regraft": lambda: fast(*args)}
    left_out: dict[str, str] = {}
    for peer in PEERS:
        made = _PEERS[peer](case, model, args)
        if isinstance(made, str):
            left_out |= {peer: made} if made else {}
        else:
            calls[peer] = made
    with torch.no_grad():
        wide = [value.double() if value.is_floating_point() else value for value in args]
        wanted = copy.deepcopy(model).double()(*wide)
        error = float((fast(*args).double() - wanted).norm() / wanted.norm())
        times = time_in_turn(calls, rounds=rounds, warm_up=1)
    kinds = {item.exactness for item in fast.report.applications}
    exactness = next((kind for kind in ("lossy", "reassociated", "bitwise") if kind in kinds), "bitwise")
    return Row(name, {key: round(value.median, 3) for key, value in times.items()}, error, exactness, left_out)


def _run(model: Callable[..., Any], args: tuple[Tensor, ...]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return model(*args)

    return call


def _eager(case: Case, model: nn.Module, args: tuple[Tensor, ...]) -> Call | str:
    return _run(model, args)


def _compiled(case: Case, model: nn.Module, args: tuple[Tensor, ...]) -> Call | str:
    torch._dynamo.reset()
    return _checked(_run(torch.compile(model, dynamic=False), args))


def _sdpa(case: Case, model: nn.Module, args: tuple[Tensor, ...]) -> Call | str:
    if not case.softmax:
        return ""

    def call() -> Any:
        with attending(attend_sdpa), torch.no_grad():
            return model(*args)

    return _checked(call)


def _flex(case: Case, model: nn.Module, args: tuple[Tensor, ...]) -> Call | str:
    if not case.softmax:
        return ""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    blocks: list[Any] = []
    place = 0

    def recording(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        blocks.append(None if seen is None else _block_mask(create_block_mask, seen, query, key))
        return attend_written_out(query, key, value, seen)

    def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        nonlocal place
        place += 1
        out: Tensor = compiled(query, key.contiguous(), value.contiguous(), block_mask=blocks[place - 1])
        return out

    def call() -> Any:
        nonlocal place
        place = 0
        with attending(attend), torch.no_grad():
            return model(*args)

    with attending(recording), torch.no_grad():
        model(*args)
    return _checked(call)


def _block_mask(create: Any, seen: Tensor, query: Tensor, key: Tensor) -> Any:
    batch, heads, rows, keys = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    table = seen.reshape(*(1,) * (4 - seen.dim()), *seen.shape)
    first, second = (None if size == 1 else size for size in (table.shape[0], table.shape[1]))
    whole = table.expand(first or batch, second or heads, rows, keys)
    return create(lambda b, h, q, k: whole[b, h, q, k], first, second, rows, keys, device="cpu")


def _checked(call: Call) -> Call | str:
    """The call if it works, else why not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return call


_PEERS: dict[str, Callable[[Case, nn.Module, tuple[Tensor, ...]], Call | str]] = {
    "eager": _eager,
    "torch.compile": _compiled,
    "sdpa": _sdpa,
    "flex": _flex,
}


def measure_lossy(name: str, reduction: Reduction, rounds: int) -> Row:
    """A lossy pass beside the unreduced model, both lowered; the error is against that."""
    full, reduced, inputs = programs(reduction)
    calls: dict[str, Call] = {"regraft": lambda: reduced(*inputs), "unreduced": lambda: full(*inputs)}
    with torch.no_grad():
        wanted, given = full(*inputs)[0].double(), reduced(*inputs)[0].double()
        times = time_in_turn(calls, rounds=rounds, warm_up=1)
    error = float((given - wanted).norm() / wanted.norm())
    return Row(f"{name}: {reduction.knob}", {key: round(t.median, 3) for key, t in times.items()}, error, "lossy")


def show(rows: list[Row]) -> Table:
    """All rows: milliseconds, ratio, error."""
    table = Table(title=f"systems, fp32, {torch.get_num_threads()} threads (milliseconds)")
    names = ("regraft", *PEERS, "unreduced")
    used = [name for name in names if any(name in row.milliseconds for row in rows)]
    for column in ("system", *used, "best peer / regraft", "error", "promise", ""):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        times = [f"{row.milliseconds[name]:.1f}" if name in row.milliseconds else "-" for name in used]
        verdict = "ok" if row.passed else "WRONG"
        table.add_row(row.system, *times, f"{row.best_peer:.2f}", f"{row.error:.0e}", row.exactness, verdict)
    return table


def record(rows: list[Row], path: Path) -> None:
    """Write the rows, and what earlier runs measured that this one did not."""
    before: dict[str, Any] = {}
    if path.exists():
        before = {row["system"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for row in rows:
        ratio = None if math.isnan(row.best_peer) else round(row.best_peer, 3)
        before[row.system] = {**asdict(row), "best_peer": ratio}
    write_record("systems", {"dtype": "float32", "rows": list(before.values())}, path)


def main() -> int:
    """Measure, print, and with ``--json`` record; exit status 1 when an exact output is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="exact,lossy", help="exact, lossy or both")
    parser.add_argument("--systems", default="", help="parts of names, with ; between; all without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    logging.getLogger("regraft").setLevel(logging.ERROR)
    wanted = [part.strip() for part in options.systems.split(";") if part.strip()]

    def chosen(name: str) -> bool:
        return not wanted or any(part in name for part in wanted)

    jobs: list[Callable[[], Row]] = []
    if "exact" in options.part:
        jobs += [lambda n=n, c=c: measure(n, c, options.rounds) for n, c in CASES.items() if chosen(n)]  # type: ignore[misc]
    if "lossy" in options.part:
        jobs += [lambda n=n, r=r: measure_lossy(n, r, options.rounds) for n, r in LOSSY.items() if chosen(n)]  # type: ignore[misc]
    rows: list[Row] = []
    console = Console(width=150)
    for job in jobs:
        rows.append(job())
        if options.json is not None:  # row by row: a run that is cut off keeps what it measured
            record(rows[-1:], options.json)
        times = ", ".join(f"{name} {time:.1f}" for name, time in rows[-1].milliseconds.items())
        console.print(f"{rows[-1].system}: {times}", markup=False, highlight=False)
    console.print(show(rows))
    for reason in dict.fromkeys(f"{row.system}, {peer}: {why}" for row in rows for peer, why in row.left_out.items()):
        console.print(f"left out: {reason}", markup=False, highlight=False)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
