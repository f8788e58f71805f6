"""Token schedules that a budget chose, beside uniform ones of the same method at equal time: which loses less?

A schedule is found for each of some limits, by the search that ``compile(budget=…)`` makes, and judged on data that
played no part. Uniform ones remove the same number of tokens behind every layer; the loss of one that takes as long as
the schedule lies between those of its neighbours. Time is counted twice: as modelled work (multiplications and
additions after all fusion, the same on every machine), and as measured, beside the exact model, calls in turn.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from rich.table import Table

from bench.budget_systems import System
from bench.timing import time_in_turn
from regraft.budget import Budget
from regraft.build import Executable
from regraft.calibration import Calibration, Call, split
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.passes.budget.candidate import Composition, name_of
from regraft.passes.budget.search import search
from regraft.passes.budget.token_sites import TokenSites, find_token_sites
from regraft.passes.pipeline import finishing, recognising
from regraft.rehearsal import Rehearsal

#: Limits of KL by system, and how many tokens uniform schedules remove.
LIMITS: dict[str, tuple[float, ...]] = {"digits": (1e-3, 3e-3, 1e-2), "minilm": (5e-3, 1.5e-2, 5e-2)}
UNIFORM: dict[str, tuple[int, ...]] = {
    "digits": (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28),
    "minilm": (2, 4, 6, 8, 10, 12, 16),
}
_EQUAL = 1.001  # ratios up to which two losses are the same
_ROUNDS = 41  # in which all models are timed, one after the other

UniformPoint = tuple[int, float, float]
Name = tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A schedule beside uniform ones, which ``uniform`` holds as (tokens a layer, loss, place). A place is work or time
    (``by``) over that of the exact model; losses are KL on fresh data. ``equal`` is the loss of a uniform schedule at
    the schedule's place, None where no two of them lie around it."""

    system: str
    seed: int
    by: str
    limit: float
    schedule: str
    loss: float
    place: float
    uniform: list[UniformPoint]
    equal: float | None

    @property
    def ratio(self) -> float | None:
        """How many times more the uniform schedule loses."""
        return None if self.equal is None or self.loss <= 0 else self.equal / self.loss


class ByWork(Rehearsal):
    """Takes modelled work for time."""

    def ratio(self, composition: Composition, thorough: bool = False) -> float:
        return self.work(composition)


@dataclass
class Bench:
    """One system with the data of one seed."""

    system: System
    seed: int

    def __post_init__(self) -> None:
        self.entry = self.system.exact().entries[0]
        self.recognised = capture(self.system.module, self.system.example)
        recognising().run(self.recognised, Session(verify="off"))
        batches, fresh = self.system.data(self.seed)
        self.calls, self.fresh = ([Call(tuple(batch), {}) for batch in part] for part in (batches, fresh))
        self.sites: TokenSites = find_token_sites(self.recognised)

    def uniform(self, method: str) -> dict[int, Composition]:
        """The uniform schedules of a method by the tokens that go behind every layer."""
        numbers = UNIFORM[self.system.name]
        return {number: (self.sites.candidate(method, self.sites.uniform(method, number)),) for number in numbers}

    def schedule(self, knob: str) -> Composition:
        """The schedule that a report calls ``knob``."""
        method, _, numbers = knob.partition(", ")
        removed = tuple(map(int, numbers.partition(" of ")[0].split("+")))
        return (self.sites.candidate(method, removed),)

    def rehearsal(self, calibration: Calibration, kind: type[Rehearsal], limit: float = 1.0) -> Rehearsal:
        """The system on some calls."""
        budget = Budget("kl", limit)
        return kind(self.recognised, finishing("cpu"), self.entry, self.system.module, calibration, budget)

    def scheduled(self, limit: float, seconds: float, kind: type[Rehearsal]) -> Composition | None:
        """What the search finds for a limit; None where the exact model remains, and why is printed."""
        calibration = split(self.calls, self.entry, self.seed)
        budget = Budget("kl", limit, seconds=seconds, seed=self.seed)
        found = search(self.rehearsal(calibration, kind, limit), budget, [], self.sites)
        if found.chosen is None:
            print(f"{self.system.name}, seed {self.seed}, limit {limit:g}: {found.why}")
            return None
        return found.chosen.composition


def compare(system: System, seed: int, by: str, seconds: float) -> Iterator[Point]:
    """A point for each limit for which a schedule was found. All are found first, and placed together with the uniform
    ones of their methods."""
    bench = Bench(system, seed)
    kind = ByWork if by == "work" else Rehearsal
    found = {limit: bench.scheduled(limit, seconds, kind) for limit in LIMITS[system.name]}
    knobs = {limit: composition[0].knob for limit, composition in found.items() if composition is not None}
    judge = bench.rehearsal(Calibration(bench.fresh, []), Rehearsal)
    models = _models(bench, knobs.values())
    lost = {name: float(judge.losses(item).mean()) for name, item in models.items()}
    rows = []
    for limit, knob in knobs.items():
        uniform = {number: lost[name_of(item)] for number, item in bench.uniform(_method(knob)).items()}
        rows.append({"limit": limit, "schedule": knob, "loss": lost[name_of(bench.schedule(knob))], "uniform": uniform})
    yield from _placed(bench, judge, by, rows)


def _models(bench: Bench, knobs: Iterable[str]) -> dict[Name, Composition]:
    """Schedules by what reports call them, and the uniform ones of their methods."""
    items = [item for knob in knobs for item in (bench.schedule(knob), *bench.uniform(_method(knob)).values())]
    return {name_of(item): item for item in items}


def again(system: System, seed: int, by: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """The points of a record of one system and seed with places of now: what was found and lost is taken from it."""
    bench = Bench(system, seed)
    judge = bench.rehearsal(Calibration(bench.fresh[:1], []), Rehearsal)
    yield from _placed(
        bench, judge, by, [{**row, "uniform": {number: loss for number, loss, _ in row["uniform"]}} for row in rows]
    )


def _placed(bench: Bench, judge: Rehearsal, by: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    models = _models(bench, [row["schedule"] for row in rows])
    if by == "work":
        place = {name: judge.work(item) for name, item in models.items()}
    else:
        place = in_turn(bench.entry.executable, judge, models)
    for row in rows:
        uniform = {number: bench.uniform(_method(row["schedule"]))[number] for number in row["uniform"]}
        own = {name_of(item): number for number, item in uniform.items()}
        name = name_of(bench.schedule(row["schedule"]))
        points = monotone([(number, row["uniform"][number], place[item]) for item, number in own.items()])
        here = next((there for number, _, there in points if number == own.get(name)), place[name])
        yield Point(
            bench.system.name,
            bench.seed,
            by,
            row["limit"],
            row["schedule"],
            row["loss"],
            here,
            points,
            at(points, here),
        )


def _method(knob: str) -> str:
    return knob.partition(",")[0]


def in_turn(exact: Executable, judge: Rehearsal, models: Mapping[Name, Composition]) -> dict[Name, float]:
    """The time of each over the exact model's: the median over rounds in which every model runs in turn."""
    built = {name: judge.executable(item) for name, item in models.items()}
    assert all(built.values())
    runs = {"exact": exact, **{"; ".join(name): model for name, model in built.items() if model is not None}}
    times = time_in_turn(
        {name: functools.partial(run, *judge.example) for name, run in runs.items()}, rounds=_ROUNDS, settle=0.0
    )
    beside = times["exact"].milliseconds
    return {
        name: median(own / exact for own, exact in zip(times["; ".join(name)].milliseconds, beside, strict=True))
        for name in models
    }


def monotone(uniform: Sequence[UniformPoint]) -> list[UniformPoint]:
    """The same with places that do not rise with the tokens removed: the nearest such ones, by least squares."""
    from sklearn.isotonic import IsotonicRegression

    places = IsotonicRegression(increasing=False).fit_transform([n for n, _, _ in uniform], [p for _, _, p in uniform])
    return [(number, loss, float(place)) for (number, loss, _), place in zip(uniform, places, strict=True)]


def at(uniform: Sequence[UniformPoint], place: float) -> float | None:
    """The loss of uniform schedules at a place, interpolated in the logarithm; of equal places the least loss counts.
    None where no two of them lie around it."""
    least: dict[float, float] = {}
    for _, loss, here in uniform:
        least[here] = min(loss, least.get(here, math.inf))
    for (before, more), (after, less) in itertools.pairwise(sorted(least.items())):
        if before <= place <= after and more > 0 and less > 0:
            share = (place - before) / (after - before)
            return math.exp((1 - share) * math.log(more) + share * math.log(less))
    return None


def summary(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each system and way of counting time: geometric mean and spread (a factor) of the ratios, in how many points
    uniform schedules lose more and in how many less, and how many there are; in the others the schedule is uniform."""
    rows = []
    for system, by in sorted({(point["system"], point["by"]) for point in points}):
        own = [p["ratio"] for p in points if (p["system"], p["by"]) == (system, by) and p["ratio"] is not None]
        if own:
            logs = [math.log(ratio) for ratio in own]
            spread = math.exp(stdev(logs)) if len(logs) > 1 else None
            better, worse = sum(ratio > _EQUAL for ratio in own), sum(ratio < 1 / _EQUAL for ratio in own)
            rows.append(
                {
                    "system": system,
                    "by": by,
                    "ratio": math.exp(mean(logs)),
                    "spread": spread,
                    "better": better,
                    "worse": worse,
                    "points": len(own),
                }
            )
    return rows


def table(points: Sequence[Mapping[str, Any]]) -> Table:
    """One row a point."""
    made = Table(
        "system", "seed", "by", "limit", "schedule", "loss", "place", "uniform: loss at place", "at equal", "ratio"
    )
    for point in points:
        beside = ", ".join(f"{number}: {loss:.1e} at {place:.2f}" for number, loss, place in point["uniform"])
        equal, ratio = (
            ("-" if value is None else f"{value:{form}}")
            for value, form in ((point["equal"], ".1e"), (point["ratio"], ".2f"))
        )
        made.add_row(
            point["system"], str(point["seed"]), point["by"], f"{point['limit']:g}", point["schedule"],
            f"{point['loss']:.1e}", f"{point['place']:.3f}", beside, equal, ratio,
        )  # fmt: skip
    return made
