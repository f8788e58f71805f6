"""The space that is searched: compositions, what is predicted of them, and which lie beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from regraft.passes.budget.candidate import Candidate, Composition, composed
from regraft.passes.budget.probing import Measured
from regraft.passes.budget.token_sites import SITE, TokenSites
from regraft.passes.budget.trials import Tried
from regraft.passes.tokens.reduce import ReduceTokens
from regraft.solvers.schedule.choice import Choice, Option, Pick, Sites, curve
from regraft.solvers.schedule.correction import corrected
from regraft.solvers.schedule.tokens import TokenTable, solve_tokens

_SCHEDULES = 24  # of the front that the joint choice is made from
_OPTIMISM = 4.0  # sums of single losses may also predict too much: the ladder goes beyond the limit by this
_STEPS = 64.0  # and down to this part of it
_LARGEST = 1e300  # of limits that can be multiplied


@dataclass
class Space:
    """Compositions of the candidates that were measured. ``alone`` is the table of schedules as single removals gave
    it, before it was corrected."""

    measured: Measured
    sites: TokenSites | None
    exact_seconds: float
    by_name: dict[str, Candidate] = field(default_factory=dict)
    alone: TokenTable | None = None

    def __post_init__(self) -> None:
        self.by_name = {candidate.name: candidate for candidate in self.measured.loss}
        self.alone = self.measured.tokens

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to choose."""
        return not self.measured.loss and self.measured.tokens is None

    def predict(self, composition: Composition) -> tuple[float, float]:
        """The sums of loss and time."""
        loss, seconds = 0.0, self.exact_seconds
        for candidate in composition:
            removed = schedule_of(candidate)
            if removed is not None and self.measured.tokens is not None:
                own, whole = self.measured.tokens.cost(removed)
                loss, seconds = loss + own, seconds + whole - self.exact_seconds
            else:
                loss += self.measured.loss.get(candidate, math.inf)
                seconds -= self.measured.saved.get(candidate, 0.0)
        return loss, seconds

    def correct(self, tried: Iterable[Tried]) -> None:
        """Make the table of schedules agree with what whole compositions lost."""
        if self.alone is None:
            return
        schedules: dict[tuple[int, ...], float] = {}
        for item in tried:
            removed = removed_by(item.composition)
            if removed is not None and item.loss is not None:
                others = self.predict(tuple(c for c in item.composition if c.site != SITE))[0]
                schedules[removed] = max(self.measured.tail * item.loss.typical - others, 0.0)
        self.measured.tokens = corrected(self.alone, schedules)

    def curve(self, limit: float, number: int) -> list[Choice]:
        """The solvers' front of joint choices around ``limit``, slow and exact first."""
        limit = min(limit, _LARGEST)
        limits = [float(value) for value in np.geomspace(limit / _STEPS, limit * _OPTIMISM, number)]
        options = {site: list(own) for site, own in self._options(limits[-1]).items()}
        return curve(Sites(options, self.exact_seconds, self._conflicts(options)), limits, time_limit=0.5 * number)

    def _options(self, limit: float) -> dict[str, list[Option]]:
        options: dict[str, list[Option]] = {}
        for candidate, loss in self.measured.loss.items():
            saved = self.measured.saved[candidate]
            options.setdefault(candidate.site, []).append(Option(candidate.name, loss, -saved))
        for schedule in self.schedules(limit):
            self.by_name[schedule.name] = schedule
            loss, seconds = self.predict((schedule,))
            options.setdefault(SITE, []).append(Option(schedule.name, loss, seconds - self.exact_seconds))
        return options

    def _conflicts(self, options: dict[str, list[Option]]) -> list[tuple[Pick, Pick]]:
        return [
            ((candidate.site, candidate.name), (site, option.name))
            for candidate in self.measured.loss
            for site in sorted(candidate.excludes & options.keys())
            for option in options[site]
        ]

    def schedules(self, limit: float) -> list[Candidate]:
        """Schedules of the front, spread over their times."""
        if self.measured.tokens is None or self.sites is None:
            return []
        found = [s for s in solve_tokens(self.measured.tokens, limit).schedules if any(s.removed)]
        places = sorted({round(at) for at in np.linspace(0, len(found) - 1, min(len(found), _SCHEDULES))})
        return [self.sites.candidate(self.measured.method, found[place].removed) for place in places]

    def uniform(self) -> Iterator[Composition]:
        """The same number of tokens behind every layer, ever more of them: what a schedule must beat."""
        if self.measured.tokens is None or self.sites is None:
            return
        seen = set()
        for number in self.sites.removals[1:]:
            removed = self.sites.uniform(self.measured.method, number)
            if removed in seen:
                continue
            seen.add(removed)
            yield (self.sites.candidate(self.measured.method, removed),)

    def composition(self, choice: Choice) -> Composition:
        """The candidates of a choice."""
        return composed(self.by_name[name] for name in choice.picks.values())

    def neighbours(self, composition: Composition) -> Iterator[Composition]:
        """Compositions that differ at one site, or in one step of the schedule, and are predicted to be faster."""
        _, now = self.predict(composition)
        for neighbour in (*self._other_sites(composition), *self._other_schedules(composition)):
            if self.predict(neighbour)[1] < now:
                yield neighbour

    def calmer(self, composition: Composition) -> list[Composition]:
        """Compositions with another schedule that are predicted to be no slower, those first that are predicted to lose
        least: the solver's own, and neighbours."""
        if self.measured.tokens is None or self.sites is None or removed_by(composition) is None:
            return []
        loss, now = self.predict(composition)
        rest = [candidate for candidate in composition if candidate.site != SITE]
        found = [composed([*rest, schedule]) for schedule in self.schedules(2 * loss)]
        found += self._other_schedules(composition)
        places = {other: self.predict(other) for other in found if other != composition}
        kept = [other for other, (_, seconds) in places.items() if seconds <= now]
        return sorted(kept, key=lambda other: places[other])

    def price(self, now: Composition, then: Composition) -> float:
        """The loss that each second saved costs, by prediction."""
        (loss, seconds), (more, fewer) = self.predict(now), self.predict(then)
        return (more - loss) / max(seconds - fewer, 1e-12)

    def _other_sites(self, composition: Composition) -> Iterator[Composition]:
        held = {candidate.site: candidate for candidate in composition}
        for candidate in self.measured.loss:
            if held.get(candidate.site) == candidate or candidate.excludes & held.keys():
                continue
            if any(candidate.site in other.excludes for other in composition):
                continue
            yield composed([*(own for own in composition if own.site != candidate.site), candidate])

    def _other_schedules(self, composition: Composition) -> Iterator[Composition]:
        """One or two steps more behind a layer; with it, less behind another one, or behind all later ones."""
        if self.measured.tokens is None or self.sites is None:
            return
        rest = [candidate for candidate in composition if candidate.site != SITE]
        removed = removed_by(composition) or (0,) * self.sites.layers
        for schedule in dict.fromkeys(_moves(removed, self.sites.removals)):
            possible = self.sites.is_possible(self.measured.method, schedule)
            if possible and math.isfinite(self.measured.tokens.cost(schedule)[0]):
                yield composed([*rest, self.sites.candidate(self.measured.method, schedule)])


def _moves(removed: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Schedules beside ``removed``, of numbers in ``steps``."""
    places = [steps.index(number) for number in removed]
    for layer, place in enumerate(places):
        for more in (place + 1, place + 2):
            if more >= len(steps):
                continue
            moved = [*places[:layer], more, *places[layer + 1 :]]
            yield tuple(steps[at] for at in moved)
            yield tuple(steps[max(at - 1, 0) if other > layer else at] for other, at in enumerate(moved))
            for other, at in enumerate(moved):
                if other != layer and at:
                    for less in {at - 1, 0}:
                        yield tuple(steps[less if number == other else at] for number, at in enumerate(moved))


def removed_by(composition: Composition) -> tuple[int, ...] | None:
    """The schedule of a composition; None where it removes no tokens."""
    return next((found for candidate in composition if (found := schedule_of(candidate)) is not None), None)


def schedule_of(candidate: Candidate) -> tuple[int, ...] | None:
    """The schedule of a candidate that removes tokens."""
    rewrite = candidate.rewrite
    return rewrite.schedule if isinstance(rewrite, ReduceTokens) and isinstance(rewrite.schedule, tuple) else None
