"""Accuracy budgets: does a spent budget hold on data that nobody has seen, and does a schedule beat a uniform one?

    python -m bench.budget [--systems minilm digits] [--runs 10] [--compared 3] [--first 0] [--seconds 20] [--add]
    python -m bench.budget --again [--systems …] [--by …]    # places the schedules of the record anew

Each run draws calibration data by its seed, compiles with a budget on KL, and measures the KL of the result on fresh
data. Then schedules are compared with uniform ones (``bench/budget_uniform.py``). KL of MiniLM, which gives embeddings,
is that of the softmax over cosines to a bank of passages (``bench/budget_systems.py``).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import regraft
from bench import budget_uniform
from bench.budget_systems import SYSTEMS, Batch, System
from bench.timing import RESULTS, time_in_turn, write_record
from regraft.passes.budget.metric import losses


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


def spend(system: System, seed: int, seconds: float, families: tuple[str, ...] | None = None) -> tuple[Any, Run]:
    """Compile with the system's budget, and measure on fresh data."""
    calibration, fresh = system.data(seed)
    budget = regraft.Budget("kl", system.limit, seconds=seconds, seed=seed, families=families)
    fast = regraft.compile(system.module, system.example, budget=budget, calibration=calibration, verify="final")
    exact = system.exact()
    times = time_in_turn({"exact": lambda: exact(*system.example), "fast": lambda: fast(*system.example)}, rounds=25)
    rounds = zip(times["exact"].milliseconds, times["fast"].milliseconds, strict=True)
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
        speedup=median(before / after for before, after in rounds),
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


def main() -> None:
    """Run, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--runs", type=int, default=10, help="budgets that are spent")
    parser.add_argument("--compared", type=int, default=3, help="seeds whose schedules are compared with uniform ones")
    parser.add_argument("--by", nargs="+", choices=("work", "time"), default=["work", "time"])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--add", action="store_true", help="add to the record what it does not hold of these runs")
    parser.add_argument("--again", action="store_true", help="time the schedules of the record once more, and no more")
    parser.add_argument("--seconds", type=float, default=20.0, help="time of each search")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    path = options.json or RESULTS / "budget.json"
    made: dict[str, list[dict[str, Any]]] = {"runs": [], "uniform": []}
    if (options.add or options.again) and path.exists():
        made = {kind: json.loads(path.read_text(encoding="utf-8"))[kind] for kind in made}

    def keep(kind: str, row: dict[str, Any]) -> None:
        made[kind] = added(made[kind], row)
        write_record("budget", {**made, "summary": budget_uniform.summary(made["uniform"])}, path)

    if options.again:
        for name, seed, by, rows in placed(made["uniform"], options.systems, options.by):
            for point in budget_uniform.again(SYSTEMS[name](seed), seed, by, rows):
                keep("uniform", {**asdict(point), "ratio": point.ratio})
        options.runs = options.compared = 0
    for name, number in itertools.product(options.systems, range(options.runs)):
        run = spend(SYSTEMS[name](0), options.first + number, options.seconds)[1]
        keep("runs", {**asdict(run), "within": run.within})
    for name, number, by in itertools.product(options.systems, range(options.compared), options.by):
        seed = options.first + number
        for point in budget_uniform.compare(SYSTEMS[name](seed), seed, by, options.seconds):
            keep("uniform", {**asdict(point), "ratio": point.ratio})
    show(made)
    Console().print(f"wrote {path}")


def placed(
    rows: Sequence[Mapping[str, Any]], systems: Sequence[str], ways: Sequence[str]
) -> Iterator[tuple[str, int, str, list[Mapping[str, Any]]]]:
    """The compared schedules of a record by system, seed and way of counting time."""

    def place(row: Mapping[str, Any]) -> tuple[str, int, str]:
        return row["system"], row["seed"], row["by"]

    for (name, seed, by), own in itertools.groupby(sorted(rows, key=place), key=place):
        if name in systems and by in ways:
            yield name, seed, by, list(own)


def added(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record with a new one in the place of that of the same system, seed, limit and count of time."""

    def place(row: Mapping[str, Any]) -> tuple[str, str, int, float]:
        return row["system"], row.get("by", ""), row["seed"], row["limit"]

    known = {place(item): item for item in (*rows, row)}
    return [known[key] for key in sorted(known)]


def show(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Both tables, and what they come to."""
    first = Table("system", "seed", "limit", "held out", "bound", "fresh", "within", "speed-up", "rewrites")
    for run in made["runs"]:
        held = [f"{value:.1e}" if value is not None else "-" for value in (run["held_out"], run["bound"])]
        first.add_row(
            run["system"], str(run["seed"]), f"{run['limit']:g}", *held, f"{run['fresh']:.1e}",
            "yes" if run["within"] else "NO", f"{run['speedup']:.2f}x",
            "; ".join(run["rewrites"]) or run["kept_exact"],
        )  # fmt: skip
    console = Console(width=200)
    console.print(first, budget_uniform.table(made["uniform"]))
    for name in dict.fromkeys(run["system"] for run in made["runs"]):
        own = [run for run in made["runs"] if run["system"] == name]
        speedups = [run["speedup"] for run in own]
        console.print(
            f"{name}: within the budget in {sum(run['within'] for run in own)} of {len(own)} runs; {min(speedups):.2f} "
            f"to {max(speedups):.2f} times as fast as the exact model, median {median(speedups):.2f}"
        )
    for row in budget_uniform.summary(made["uniform"]):
        console.print(
            f"{row['system']}, equal {row['by']}: uniform schedules lose {row['ratio']:.2f} times as much (geometric "
            f"mean, spread {row['spread'] or 1:.2f}), more in {row['better']} and less in {row['worse']} of "
            f"{row['points']}"
        )


if __name__ == "__main__":
    main()
