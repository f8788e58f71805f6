"""One choice over all sites: at most one option at each, within a limit of loss, as fast as possible.

A multiple-choice knapsack with conflicts, as an integer program. Losses and times are taken to add up: whoever uses the
answer measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pulp

from regraft.solvers.placement.ilp import solve
from regraft.solvers.schedule.errors import ScheduleError
from regraft.solvers.schedule.points import front

_ROUNDING = 2e-6  # more than a solver may overstep a constraint by


#: A site and the name of one of its options.
Pick = tuple[str, str]


@dataclass(frozen=True)
class Option:
    """One way to change a site: the loss it brings, and the seconds it adds (less than zero where it saves)."""

    name: str
    loss: float
    seconds: float


@dataclass(frozen=True)
class Sites:
    """Site -> its options; leaving a site as it is costs nothing. ``conflicts`` are pairs of (site, option name) that
    cannot go together; ``base`` is the time with nothing changed."""

    options: Mapping[str, Sequence[Option]]
    base: float = 0.0
    conflicts: Sequence[tuple[Pick, Pick]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        known = {(site, option.name) for site, options in self.options.items() for option in options}
        if len(known) != sum(len(options) for options in self.options.values()):
            raise ScheduleError("two options of one site have the same name; name them apart")
        missing = [end for pair in self.conflicts for end in pair if end not in known]
        if missing:
            raise ScheduleError(f"a conflict names the option {missing[0]}, which no site has")
        for site, options in self.options.items():
            for option in options:
                if not option.loss >= 0 or not math.isfinite(option.seconds):
                    raise ScheduleError(
                        f"option {option.name!r} of {site!r} has loss {option.loss} and time {option.seconds}; "
                        "expected a loss of 0 or more and a finite time"
                    )


@dataclass(frozen=True)
class Choice:
    """The option of each site that is changed, with the sums of loss and time. No choice within the limit takes less
    than ``bound``; ``gap`` is the distance (0 to 1). ``stop`` is "optimal" or "time limit"."""

    picks: dict[str, str]
    loss: float
    seconds: float
    bound: float
    gap: float
    stop: str


def choose(sites: Sites, limit: float, time_limit: float = math.inf) -> Choice:
    """The fastest choice whose loss is at most ``limit``. Changing nothing is always one, and is what is left where the
    time limit stops the solver before it finds another. Raises ``ScheduleError`` for a negative limit."""
    if not limit >= 0:
        raise ScheduleError(f"the limit {limit} was given; give 0 or more")
    useful = {
        (site, option.name): option
        for site, options in sites.options.items()
        for option in options
        if option.loss <= limit and option.seconds < 0
    }
    if not useful:
        return Choice({}, 0.0, sites.base, sites.base, 0.0, "optimal")
    program, variables, scale = _program(sites, limit, useful)
    outcome = solve(program, seconds=time_limit, gap=0.0)
    picked = _picked(useful, variables) if outcome.status != "none" else {}
    if math.fsum(option.loss for option in picked.values()) > limit:  # by the solver's rounding
        program, variables, scale = _program(sites, limit, useful, _ROUNDING)
        again = solve(program, seconds=time_limit, gap=0.0)
        picked = _picked(useful, variables) if again.status != "none" else {}
    saved = {pick[0]: 0.0 for pick in useful}
    for pick, option in useful.items():
        saved[pick[0]] = min(saved[pick[0]], option.seconds)
    least = sites.base + math.fsum(saved.values())
    bound = max(least, sites.base + outcome.bound * scale) if math.isfinite(outcome.bound) else least
    return _made(sites.base, picked, bound, "optimal" if outcome.status == "optimal" else "time limit")


def _program(
    sites: Sites, limit: float, useful: Mapping[Pick, Option], margin: float = 0.0
) -> tuple[pulp.LpProblem, dict[Pick, pulp.LpVariable], float]:
    """The integer program, its variables, and the seconds that its objective counts in."""
    variables = {pick: pulp.LpVariable(f"x{number}", cat="Binary") for number, pick in enumerate(useful)}
    scale = max(-option.seconds for option in useful.values())
    program = pulp.LpProblem("choice", pulp.LpMinimize)
    program += pulp.lpSum(option.seconds / scale * variables[pick] for pick, option in useful.items())
    if 0 < limit < math.inf:
        spent = pulp.lpSum(option.loss / limit * variables[pick] for pick, option in useful.items())
        program += spent <= 1 - margin
    for site in sites.options:
        own = [variables[pick] for pick in useful if pick[0] == site]
        if len(own) > 1:
            program += pulp.lpSum(own) <= 1
    for first, second in sites.conflicts:
        if first in useful and second in useful and first[0] != second[0]:
            program += variables[first] + variables[second] <= 1
    return program, variables, scale


def _picked(useful: Mapping[Pick, Option], variables: Mapping[Pick, pulp.LpVariable]) -> dict[Pick, Option]:
    return {pick: option for pick, option in useful.items() if (variables[pick].varValue or 0.0) > 0.5}


def _made(base: float, picked: Mapping[Pick, Option], bound: float, stop: str) -> Choice:
    seconds = base + math.fsum(option.seconds for option in picked.values())
    bound = seconds if stop == "optimal" else min(bound, seconds)
    gap = (seconds - bound) / seconds if seconds > 0 else 0.0
    loss = math.fsum(option.loss for option in picked.values())
    return Choice({site: name for site, name in picked}, loss, seconds, bound, gap, stop)


def curve(sites: Sites, limits: Sequence[float], time_limit: float = math.inf) -> list[Choice]:
    """The Pareto front of the best choices for ``limits``; the time limit is for all of them together."""
    share = time_limit / max(len(limits), 1)
    return front(choose(sites, limit, share) for limit in sorted(set(limits)))
