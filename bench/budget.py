"""Accuracy budgets: does a spent budget hold on data that nobody has seen, and does a schedule beat a uniform one?

    python -m bench.budget [--systems minilm digits] [--runs 10] [--first 0] [--compared 3] [--seconds 60] [--add]

Each run draws calibration data by its seed, compiles with a budget on KL, and measures the KL of the result on fresh
data. In the first runs a second model, with token schedules as its only rewrite, is compared with uniform schedules of
the same method: the same number of tokens behind every layer, at the times that lie around the scheduled one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import regraft
from bench.budget_systems import SYSTEMS, Batch, System
from bench.timing import RESULTS, time_in_turn, write_record
from regraft.build import Toolchain
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.passes.budget.metric import losses
from regraft.passes.budget.token_sites import SITE, TokenSites, find_token_sites
from regraft.passes.pipeline import default_pipeline, recognising
from regraft.passes.tokens.reduce import ReduceTokens

_AROUND = 4  # uniform schedules that are built beside a scheduled one


@dataclass(frozen=True)
class Run:
    """One budget, spent. ``fresh`` is the mean loss on data that played no part, ``speedup`` exact over lossy time."""

    system: str
    seed: int
    limit: float
    rewrites: list[str]
    loss: float | None
    held_out: float | None
    bound: float | None
    fresh: float
    speedup: float
    search_seconds: float
    optimism: float | None
    kept_exact: str = ""

    @property
    def within(self) -> bool:
        """Whether the loss on fresh data keeps the limit."""
        return self.fresh <= self.limit


@dataclass(frozen=True)
class Comparison:
    """A schedule beside uniform ones, which ``uniform`` holds as (tokens a layer, KL, milliseconds). ``equal_time`` is
    the KL of a uniform schedule at the scheduled one's time, between the two around it."""

    system: str
    seed: int
    schedule: str
    fresh: float
    milliseconds: float
    uniform: list[tuple[int, float, float]]
    equal_time: float | None

    @property
    def ratio(self) -> float | None:
        """How many times more the uniform schedule loses."""
        return None if self.equal_time is None or self.fresh <= 0 else self.equal_time / self.fresh


def spend(system: System, seed: int, seconds: float, families: tuple[str, ...] | None = None) -> tuple[Any, Run]:
    """Compile with the system's budget, and measure on fresh data."""
    calibration, fresh = system.data(seed)
    budget = regraft.Budget("kl", system.limit, seconds=seconds, seed=seed, families=families)
    fast = regraft.compile(system.module, system.example, budget=budget, calibration=calibration, verify="final")
    exact = regraft.compile(system.module, system.example, verify="off")
    times = time_in_turn({"exact": lambda: exact(*system.example), "fast": lambda: fast(*system.example)}, rounds=9)
    told = fast.report.budget
    if told.refused:
        raise RuntimeError(f"{system.name}: {told.refused}")
    run = Run(
        system=system.name,
        seed=seed,
        limit=system.limit,
        rewrites=[f"{decision.site}: {decision.knob}" for decision in told.decisions],
        loss=told.loss,
        held_out=told.held_out,
        bound=told.held_out_bound,
        fresh=mean_kl(fast, system, fresh),
        speedup=times["exact"].median / times["fast"].median,
        search_seconds=told.search_seconds,
        optimism=told.optimism,
        kept_exact=told.kept_exact,
    )
    return fast, run


def mean_kl(fast: Callable[..., Tensor], system: System, batches: Sequence[Batch]) -> float:
    """The mean KL to the original over some batches."""
    with torch.no_grad():
        found = [losses("kl", fast(*batch), system.module(*batch)) for batch in batches]
    return float(torch.cat(found).mean())


def compare(system: System, seed: int, seconds: float) -> Comparison | None:
    """A schedule that a budget chose, and uniform schedules of the same method; None where the budget was not spent."""
    fast, _ = spend(system, seed, seconds, families=("tokens",))
    decisions = [decision for decision in fast.report.budget.decisions if decision.site == SITE]
    if not decisions:
        return None
    method, _, rest = decisions[0].knob.partition(", ")
    removed = tuple(int(number) for number in rest.partition(" of ")[0].split("+"))
    program = capture(system.module, system.example)
    recognising().run(program, Session(verify="off"))
    sites = find_token_sites(program)
    assert sites is not None
    _, fresh = system.data(seed)
    others = {number: _uniform(system, method, number) for number in _around(sites, method, removed)}
    calls = {f"{number}": (lambda other=other: other(*system.example)) for number, other in others.items()}
    times = time_in_turn({"scheduled": lambda: fast(*system.example), **calls}, rounds=15)
    uniform = [
        (number, mean_kl(other, system, fresh), times[f"{number}"].median) for number, other in sorted(others.items())
    ]
    own = times["scheduled"].median
    return Comparison(
        system.name, seed, decisions[0].knob, mean_kl(fast, system, fresh), own, uniform, at_time(uniform, own)
    )


def _around(sites: TokenSites, method: str, removed: tuple[int, ...]) -> list[int]:
    """Numbers of tokens whose uniform schedules leave about as many tokens to all layers together."""

    def left(schedule: tuple[int, ...]) -> int:
        return sum(sites.tokens - sum(schedule[: layer + 1]) for layer in range(len(schedule)))

    numbers = range(1, max(2, (sites.tokens - sites.protected) // 2))
    distinct = {sites.uniform(method, number): number for number in reversed(numbers)}
    nearest = sorted(distinct, key=lambda schedule: abs(left(schedule) - left(removed)))[: 3 * _AROUND]
    spread = sorted(distinct[schedule] for schedule in nearest)
    return sorted({spread[round(at * (len(spread) - 1) / (_AROUND - 1))] for at in range(_AROUND)})


def _uniform(system: System, method: str, number: int) -> Callable[..., Tensor]:
    program = capture(system.module, system.example)
    recognising().run(program, Session(verify="off"))
    sites = find_token_sites(program)
    assert sites is not None
    lossy = (ReduceTokens(sites.uniform(method, number), method),)
    toolchain = Toolchain(pipeline=lambda target: default_pipeline(target, tokens=lossy))
    fast: Callable[..., Tensor] = regraft.compile(system.module, system.example, toolchain=toolchain, verify="off")
    return fast


def at_time(uniform: Sequence[tuple[int, float, float]], milliseconds: float) -> float | None:
    """The KL of uniform schedules at a time, interpolated in the logarithm; None where no two of them lie around it."""
    points = sorted((time, loss) for _, loss, time in uniform)
    for (before, more), (after, less) in itertools.pairwise(points):
        if before <= milliseconds <= after and more > 0 and less > 0:
            share = (milliseconds - before) / max(after - before, 1e-9)
            return math.exp((1 - share) * math.log(more) + share * math.log(less))
    return None


def main() -> None:
    """Run, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first run")
    parser.add_argument("--add", action="store_true", help="add to the record what it does not hold of these runs")
    parser.add_argument("--compared", type=int, default=3, help="runs that are compared with uniform schedules")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of each search")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    runs: list[Run] = []
    comparisons: list[Comparison] = []
    for name in options.systems:
        system = SYSTEMS[name]()
        for seed in range(options.first, options.first + options.runs):
            runs.append(spend(system, seed, options.seconds)[1])
            Console().print(runs[-1])
        for seed in range(options.first, options.first + options.compared):
            found = compare(system, seed, options.seconds)
            comparisons += [found] if found is not None else []
            Console().print(found)
    show(runs, comparisons)
    made = {
        "runs": [{**asdict(run), "within": run.within} for run in runs],
        "uniform": [{**asdict(item), "ratio": item.ratio} for item in comparisons],
    }
    path = options.json or RESULTS / "budget.json"
    if options.add and path.exists():
        made = added(json.loads(path.read_text(encoding="utf-8")), made)
    Console().print(f"wrote {write_record('budget', made, path)}")


def added(record: Mapping[str, Any], made: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a record with new ones in the place of those of the same system and seed."""

    def place(row: Mapping[str, Any]) -> tuple[str, int]:
        return row["system"], row["seed"]

    both = {kind: {place(row): row for row in (*record[kind], *rows)} for kind, rows in made.items()}
    return {kind: [rows[key] for key in sorted(rows)] for kind, rows in both.items()}


def show(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> None:
    """Both tables."""
    first = Table("system", "seed", "limit", "held out", "bound", "fresh", "within", "speed-up", "rewrites")
    for run in runs:
        held = [f"{value:.1e}" if value is not None else "-" for value in (run.held_out, run.bound)]
        said = "; ".join(run.rewrites) or run.kept_exact
        first.add_row(
            run.system, str(run.seed), f"{run.limit:g}", *held, f"{run.fresh:.1e}", "yes" if run.within else "NO",
            f"{run.speedup:.2f}x", said,
        )  # fmt: skip
    second = Table("system", "seed", "schedule", "KL", "ms", "uniform: KL at ms", "KL at equal time", "ratio")
    for item in comparisons:
        beside = ", ".join(f"{number}: {loss:.1e} at {time:.1f}" for number, loss, time in item.uniform)
        equal = "-" if item.equal_time is None else f"{item.equal_time:.1e}"
        ratio = "-" if item.ratio is None else f"{item.ratio:.1f}"
        second.add_row(
            item.system, str(item.seed), item.schedule, f"{item.fresh:.1e}", f"{item.milliseconds:.1f}", beside, equal,
            ratio,
        )  # fmt: skip
    console = Console(width=200)
    console.print(first, second)
    for name in dict.fromkeys(run.system for run in runs):
        own = [run for run in runs if run.system == name]
        console.print(f"{name}: within the budget in {sum(run.within for run in own)} of {len(own)} runs")


if __name__ == "__main__":
    main()
