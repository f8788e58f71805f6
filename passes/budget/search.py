"""Which lossy rewrites to make together: predicted by the solvers, searched by the real loss, checked on held-out data.

Sums of single losses predict too little, several times over when many rewrites meet. The solvers' answers are therefore
only where the search starts: every composition that counts was run, one that is chosen on data that played no part in
choosing it (but in relaxing the choice where it did not hold).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from regraft.passes.budget.budget import Budget
from regraft.passes.budget.candidate import Candidate, Composition, name_of
from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.estimate import Estimate, confidence_of_look, estimate, is_clearly_less
from regraft.passes.budget.neighbours import Space
from regraft.passes.budget.probing import WORTH_IT, Measured, measure
from regraft.passes.budget.token_sites import TokenSites
from regraft.passes.budget.trials import Array, Clock, Trials, Tried, checked
from regraft.solvers.schedule.choice import Choice

_LADDER = 14  # limits that the solvers are asked about
_FINALISTS, _UNIFORM = 5, 2
_ALIKE = 0.03  # part by which times vary from one measurement to the next
_NEAR = 0.1  # and by which what is predicted of them may be wrong
_SEARCH, _TRIES = 0.3, 10  # the part of the time that so many tries are to take
_FEWEST = 16  # samples of a try
_ASKED = 3  # times that the solvers are asked, with tables corrected by what was run
_FAILURES = 16  # neighbours of the best composition that are tried before it is taken for the best
_FAILURES_CALM = 8  # and of those that are as fast and may lose less
_CALMER = 0.95  # part of a loss that is clearly less
_RELAXED = (0.5, 0.2, 0.05)  # parts of the limit that are tried when no finalist holds on held-out data


@dataclass
class Found:
    """What the search found. ``chosen`` is None where the exact model remains, and ``why`` says so in one sentence.
    ``tried`` are all compositions that were run, ``predicted`` the solvers' front. ``looks`` counts the compositions
    that were held against the limit on held-out data."""

    chosen: Tried | None = None
    why: str = ""
    exact: Estimate | None = None
    tried: list[Tried] = field(default_factory=list)
    predicted: list[Choice] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    stop: str = "done"
    seconds: float = 0.0
    looks: int = 0


def search(
    trials: Trials,
    budget: Budget,
    candidates: Sequence[Candidate],
    sites: TokenSites | None,
    clock: Clock | None = None,
    declined: Sequence[str] = (),
) -> Found:
    """Spend ``budget`` on the candidates and the token axis, by a clock that may be running. ``declined`` are the
    reasons of what is no candidate, for the report.

    Raises ``BudgetError`` where the metric is not a number, or where the data cannot show even for the exact model that
    it keeps the limit.
    """
    clock = clock or Clock.after(budget.seconds)
    found = _Search(trials, budget, clock).run(candidates, sites, declined)
    found.seconds = clock.spent
    return found


@dataclass
class _Search:
    trials: Trials
    budget: Budget
    clock: Clock
    found: Found = field(default_factory=Found)
    known: dict[tuple[str, ...], Tried] = field(default_factory=dict)
    even: dict[tuple[str, ...], Composition] = field(default_factory=dict)

    def run(self, candidates: Sequence[Candidate], sites: TokenSites | None, declined: Sequence[str]) -> Found:
        found = self.found
        found.exact = self._exact()
        found.measured = measure(self.trials, candidates, sites, self.budget, self.clock, declined)
        space = Space(found.measured, sites, self.trials.exact_seconds)
        if space.is_empty:
            found.why = "; ".join(found.measured.notes) or "every rewrite alone loses more than the budget"
            return found
        self.even = {name_of(composition): composition for composition in space.uniform()}
        self._climb(list(self.even.values()), space)
        self._ask(space)
        self._improve(space)
        self._settle(space)
        return found

    def _ask(self, space: Space) -> None:
        """Run what the solvers find for ever larger limits, correct the tables by it, ask again while that helps."""
        for _ in range(_ASKED):
            best = self._fastest()
            space.correct(self.found.tried)
            self.found.predicted = space.curve(self.budget.limit, _LADDER)
            self._climb([space.composition(choice) for choice in self.found.predicted], space)
            if self._fastest() is best or not self._may_go_on():
                return

    def _exact(self) -> Estimate:
        losses = checked(self.trials.losses(()), self.budget.limit)
        # Not as errors that a metric of one's own counts: the exact model's are all 0, whatever the metric gives.
        exact = estimate(losses, confidence_of_look(self.budget.confidence, 1), self.budget.is_rate)
        if math.isnan(exact.mean):
            raise BudgetError(
                "the metric is not a number (NaN) for the exact model on the calibration data; check the data, the "
                "model's outputs and the metric"
            )
        if abs(exact.mean) > self.budget.limit:
            told = "a metric must be 0 for equal outputs, and more for others"
            if isinstance(self.budget.metric, str):
                told = "it rounds in another order than the original; give a larger limit, or 0 for the exact model"
            raise BudgetError(
                f"the exact model has a loss of {exact.mean:.2g}, and the limit is {self.budget.limit:g}; {told}"
            )
        if not exact.within(self.budget.limit):
            raise BudgetError(
                f"the calibration data are too few: {exact.samples} samples cannot show a loss of at most "
                f"{self.budget.limit:g} at a confidence of {confidence_of_look(self.budget.confidence, 1):g}; give "
                "more batches"
            )
        return exact

    def _estimate(self, losses: Array, look: int = 1) -> Estimate:
        """What the losses say of the mean, as sure as a look at held-out data must be. Calibration data are asked as
        the first look is: what does not hold there will hardly hold on other data."""
        sure = confidence_of_look(self.budget.confidence, look)
        return estimate(checked(losses, self.budget.limit), sure, self.budget.counts_errors(losses))

    def _try(self, composition: Composition, space: Space) -> Tried:
        """Run a composition on the calibration data, once."""
        key = name_of(composition)
        if key not in self.known:
            loss, seconds = space.predict(composition)
            losses = self.trials.losses(composition, self._batches())
            tried = Tried(composition, loss, seconds, self._estimate(losses), losses=losses)
            self.known[key] = tried
            self.found.tried.append(tried)
        return self.known[key]

    def _batches(self) -> int:
        """Fewer than all where there would not be time for some tries: with fewer samples, bounds are wider."""
        affordable = _SEARCH * self.clock.seconds / (_TRIES * max(self.found.measured.per_batch, 1e-6))
        samples = self.found.exact.samples / self.trials.batches if self.found.exact is not None else 1.0
        return max(min(int(affordable), self.trials.batches), min(math.ceil(_FEWEST / samples), self.trials.batches))

    def _holds(self, tried: Tried) -> bool:
        return tried.loss is not None and tried.loss.within(self.budget.limit)

    def _climb(self, ladder: Sequence[Composition], space: Space) -> None:
        """Bisect a ladder of ever faster compositions for the last one that holds."""
        ladder = [composition for composition in ladder if composition]
        low, high = 0, len(ladder)
        while low < high and self._may_go_on():
            middle = (low + high) // 2
            if self._holds(self._try(ladder[middle], space)):
                low = middle + 1
            else:
                high = middle

    def _may_go_on(self) -> bool:
        if self.clock.part(0.8):
            return True
        self.found.stop = "time limit"
        return False

    def _improve(self, space: Space) -> None:
        """From the composition that is predicted to be the fastest of those that hold to neighbours that are faster;
        where none of them holds, to one that is as fast and loses less."""
        best = self._fastest()
        while best is not None:
            best = self._step(best, space) or self._calm(best, space)
            space.correct(self.found.tried)

    def _calm(self, best: Tried, space: Space) -> Tried | None:
        """One that is predicted to be no slower and loses clearly less."""
        assert best.loss is not None
        failures = 0
        for other in space.calmer(best.composition):
            if name_of(other) in self.known:
                continue
            if failures >= _FAILURES_CALM or not self._may_go_on():
                return None
            tried = self._try(other, space)
            if self._holds(tried) and tried.loss is not None and tried.loss.typical <= _CALMER * best.loss.typical:
                return tried
            failures += 1
        return None

    def _step(self, best: Tried, space: Space) -> Tried | None:
        """The first neighbour that holds, those first that give the most time for the loss that they add."""
        failures = 0
        for neighbour in sorted(
            space.neighbours(best.composition), key=lambda neighbour: space.price(best.composition, neighbour)
        ):
            if name_of(neighbour) in self.known:
                continue
            if failures >= _FAILURES or not self._may_go_on():
                return None
            tried = self._try(neighbour, space)
            if self._holds(tried):
                return tried
            failures += 1
        return None

    def _fastest(self) -> Tried | None:
        held = [tried for tried in self.found.tried if self._holds(tried)]
        return min(held, key=lambda tried: tried.predicted_seconds, default=None)

    def _settle(self, space: Space) -> None:
        """Measure the finalists, and take the fastest that holds on held-out data. What is looked at next depends on
        these data by nothing but that all before failed, so that the looks may share one confidence."""
        for share in (1.0, *_RELAXED):
            for tried in self._timed(self._finalists(share, space)):
                assert tried.seconds is not None
                if not tried.seconds <= WORTH_IT * self.trials.exact_seconds:
                    break
                self.found.looks += 1
                tried.held_out = self._estimate(self.trials.held_out(tried.composition), self.found.looks)
                if tried.held_out.within(self.budget.limit):
                    self.found.chosen = tried
                    return
        self.found.why = self._why()

    def _finalists(self, share: float, space: Space) -> list[Tried]:
        """The fastest by prediction among those that keep a part of the limit, and were not held out before; where
        there are none, the solvers are asked for that part."""

        def fitting() -> list[Tried]:
            limit = share * self.budget.limit
            fresh = [tried for tried in self.found.tried if tried.held_out is None]
            return [tried for tried in fresh if tried.loss is not None and tried.loss.within(limit)]

        if not fitting() and share < 1.0:
            for choice in reversed(space.curve(share * self.budget.limit / 4, 3)):
                composition = space.composition(choice)
                if composition:
                    self._try(composition, space)
        self._try_milder(fitting(), space)
        ordered = sorted(fitting(), key=lambda tried: tried.predicted_seconds)
        # A schedule that is not faster than a uniform one is not worth its name.
        made = ordered[:1] + [tried for tried in ordered if self._is_uniform(tried)][:_UNIFORM]
        made, rest = made + ordered[1 : _FINALISTS - 1], ordered[_FINALISTS - 1 :]
        # Predicted times may be wrong: what gives up most may be fast, and what loses least of the near ones as fast.
        made += sorted(rest, key=lambda tried: -tried.predicted_loss)[:1]
        near = [tried for tried in rest if tried.predicted_seconds <= (1 + _NEAR) * ordered[0].predicted_seconds]
        made += sorted(near, key=_typical)[:1]
        return list({id(tried): tried for tried in made}.values())

    def _is_uniform(self, tried: Tried) -> bool:
        return name_of(tried.composition) in self.even

    def _try_milder(self, held: Sequence[Tried], space: Space) -> None:
        """Try the uniform composition that removes less than the strongest that holds: it may be as fast."""
        names = {name_of(tried.composition) for tried in held}
        ladder = list(self.even)
        strongest = max((place for place, name in enumerate(ladder) if name in names), default=0)
        if strongest:
            self._try(self.even[ladder[strongest - 1]], space)

    def _timed(self, finalists: Sequence[Tried]) -> Iterator[Tried]:
        """Finalists with their measured time, the fastest first; of those that are as fast as it but for what times
        vary by, the one that is worth most."""
        for tried in finalists:
            if tried.seconds is None:
                ratio = self.trials.ratio(tried.composition, thorough=True)
                tried.seconds = ratio * self.trials.exact_seconds if math.isfinite(ratio) else math.inf
        left = list(finalists)
        while left:
            fastest = min(tried.seconds or math.inf for tried in left)
            best = self._best([tried for tried in left if (tried.seconds or math.inf) <= fastest * (1 + _ALIKE)])
            left.remove(best)
            yield best

    def _best(self, alike: Sequence[Tried]) -> Tried:
        """The one that loses least of some that are equally fast. A schedule that was picked out of many by its loss
        loses more on other data than it did on those (the winner's curse): a uniform one, which was not, gives way to
        it only where the difference is clear."""
        best = min(alike, key=_typical)
        uniform = min(filter(self._is_uniform, alike), key=_typical, default=best)
        return best if is_clearly_less(best.losses, uniform.losses, self.budget.is_rate) else uniform

    def _why(self) -> str:
        limit = f"{self.budget}"
        if not self.found.tried:
            if self.found.stop == "done":
                return "every rewrite alone loses more than the budget"
            return f"the {self.budget.seconds:g} seconds were over before a rewrite was tried; give the search more"
        if not any(self._holds(tried) for tried in self.found.tried):
            known = [tried.loss for tried in self.found.tried if tried.loss is not None]
            told = [loss for loss in known if not math.isnan(loss.mean)]
            if not told:
                return "the metric is not a number (NaN) for every rewritten model; check the metric"
            mildest = min(told, key=lambda loss: loss.mean)
            seconds = f", or more than {self.budget.seconds:g} seconds, which were over"
            more = "" if self.found.stop == "done" else seconds
            return (
                f"no rewrite keeps {limit}: the mildest that was tried loses {mildest.mean:.2g}, which may be "
                f"{mildest.upper:.2g} as far as {mildest.samples} samples tell; give a larger limit, or more "
                f"calibration data{more}"
            )
        if any(tried.held_out is not None for tried in self.found.tried):
            return f"nothing that keeps {limit} on the calibration data keeps it on those held out; give more of them"
        return f"nothing that keeps {limit} takes less than {WORTH_IT:.0%} of the exact model's time"


def _typical(tried: Tried) -> float:
    return tried.loss.typical if tried.loss is not None else math.inf
