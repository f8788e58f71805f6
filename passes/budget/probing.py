"""Measuring candidates one by one: what each loses on calibration data, and what each saves on the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from regraft.passes.budget.budget import Budget
from regraft.passes.budget.candidate import Candidate, Composition, composed
from regraft.passes.budget.estimate import typical
from regraft.passes.budget.token_sites import TokenSites
from regraft.passes.budget.token_table import Cut, table
from regraft.passes.budget.trials import Array, Clock, Trials, checked, mean
from regraft.solvers.schedule.tokens import TokenTable

#: A rewrite is worth offering when the model takes at most this part of the exact model's time with it everywhere.
WORTH_IT = 0.98
_NEAR = 1.5  # up to here a measurement may have been a bad moment
_CHEAP = 0.1  # part of the limit below which a family is not taken apart: all of it hardly matters
_LEVELS = (1 / 4, 1 / 8, 1 / 2, 1 / 16)  # parts of the tokens that a cut removes, the most telling first
_WORK_LAYERS = 6
_METHODS_TIMED = 3
#: Parts of the time for families, the choice of a method, the losses of cuts and their times. The search has the rest.
_FAMILIES, _METHODS, _LOSSES, _TIMES = 0.12, 0.08, 0.18, 0.12


@dataclass
class Measured:
    """Candidates that are worth it, with loss and seconds saved alone; the schedule tables; what was not offered.
    ``tail`` is how many times larger than a typical loss the mean is, ``per_batch`` the seconds that one batch of one
    composition takes to be tried."""

    loss: dict[Candidate, float] = field(default_factory=dict)
    saved: dict[Candidate, float] = field(default_factory=dict)
    tokens: TokenTable | None = None
    method: str = ""
    notes: list[str] = field(default_factory=list)
    tail: float = 1.0
    per_batch: float = 0.0


def measure(
    trials: Trials,
    candidates: Sequence[Candidate],
    sites: TokenSites | None,
    budget: Budget,
    clock: Clock,
    declined: Sequence[str] = (),
) -> Measured:
    """Measure everything that is offered, within about half of the clock's time; ``declined`` says why other things are
    not."""
    probe = _Probe(trials, budget.limit, budget.is_rate, clock)
    for family in dict.fromkeys(candidate.family for candidate in candidates):
        probe.family([candidate for candidate in candidates if candidate.family == family])
    if sites is not None:
        probe.tokens(sites)
    elif not candidates:
        probe.found.notes.append("no lossy rewrite applies to this model")
    probe.found.notes += declined
    return probe.found


def strongest(candidates: Sequence[Candidate]) -> Composition:
    """The last candidate of every site, those left out that an earlier one excludes."""
    last = {candidate.site: candidate for candidate in candidates}
    kept: list[Candidate] = []
    for candidate in last.values():
        if not any(candidate.site in other.excludes or other.site in candidate.excludes for other in kept):
            kept.append(candidate)
    return composed(kept)


@dataclass
class _Probe:
    trials: Trials
    limit: float
    is_rate: bool
    clock: Clock
    found: Measured = field(default_factory=Measured)

    def family(self, own: Sequence[Candidate]) -> None:
        """All of it at once, and each of it alone where that could matter."""
        together = strongest(own)
        ratio = self._ratio(together)
        if not ratio <= WORTH_IT:
            self.found.notes.append(_not_offered(own[0].family, ratio))
            return
        share = (1.0 - ratio) * self.trials.exact_seconds / len(together)
        everywhere = self._loss(together, 1)
        if everywhere <= _CHEAP * self.limit or len(together) == 1 == len(own):
            for candidate in together:
                self._note(candidate, everywhere / len(together), share)
            return
        self._alone(own, share)

    def _ratio(self, composition: Composition) -> float:
        """The time that decides whether something is offered: measured again where it is a near thing."""
        ratio = self.trials.ratio(composition)
        return self.trials.ratio(composition, thorough=True) if WORTH_IT < ratio < _NEAR else ratio

    def _alone(self, own: Sequence[Candidate], share: float) -> None:
        began = self.clock.spent
        for candidate in own:
            if self.clock.spent - began > _FAMILIES * self.clock.seconds:
                self.found.notes.append(f"{candidate.family}: time for measuring was over before {candidate.name}")
                return
            loss = self._loss((candidate,), self._batches(_FAMILIES / 2, len(own)))
            if not loss <= self.limit:
                continue
            ratio = self.trials.ratio((candidate,))
            # one of many saves less than the noise of a measurement: it is held between nothing and twice its share
            saved = (1.0 - ratio) * self.trials.exact_seconds if math.isfinite(ratio) else 0.0
            self._note(candidate, loss, float(np.clip(saved, 0.1 * share, 2.0 * share)))

    def _note(self, candidate: Candidate, loss: float, saved: float) -> None:
        if loss <= self.limit:
            self.found.loss[candidate], self.found.saved[candidate] = max(loss, 0.0), saved

    def tokens(self, sites: TokenSites) -> None:
        """The method, and the tables of its schedules."""
        method, seconds = self._best_method(sites)
        if not method:
            return
        legal = [layer for layer, allowed in enumerate(sites.legal[method]) if allowed]
        most = sites.most(method, sites.tokens)
        levels = list(dict.fromkeys(max(1, min(most, round(part * sites.tokens))) for part in _LEVELS))
        losses = self._losses_of_cuts(sites, method, legal, levels)
        started = self.clock.spent
        for removed in self._timed(sites, method, legal, levels):
            began = self.clock.spent
            ratio = self.trials.ratio((sites.candidate(method, removed),))
            if math.isfinite(ratio):
                seconds[removed] = ratio * self.trials.exact_seconds
            if self.clock.spent + (self.clock.spent - began) > started + _TIMES * self.clock.seconds:
                break
        self.found.method = method
        work = self._work(sites, method, legal, levels[0])
        self.found.tokens = table(sites, method, losses, seconds, work, self.trials.exact_seconds)

    def _work(self, sites: TokenSites, method: str, legal: Sequence[int], removed: int) -> dict[int, float]:
        """The part of the work that a token saves which goes behind some of the layers."""
        places = sorted({legal[round(at)] for at in np.linspace(0, len(legal) - 1, min(len(legal), _WORK_LAYERS))})
        left = {layer: self.trials.work((_cut(sites, method, Cut(layer, removed)),)) for layer in places}
        return {layer: max(1.0 - value, 0.0) / removed for layer, value in left.items() if math.isfinite(value)}

    def _losses_of_cuts(
        self, sites: TokenSites, method: str, legal: Sequence[int], levels: Sequence[int]
    ) -> dict[Cut, float]:
        """As many levels and layers as there is time for; the table fills in what is missing. Means as typical losses
        tell them: of many single removals, those are known better."""
        affordable = int(_LOSSES * self.clock.seconds / max(self.found.per_batch, 1e-6))
        kept = levels[: max(1, affordable // len(legal))]
        number = max(2, min(len(legal), affordable // len(kept)))
        layers = sorted({legal[round(at)] for at in np.linspace(0, len(legal) - 1, number)})
        batches = self._batches(_LOSSES, len(layers) * len(kept))
        cuts = [Cut(layer, removed) for removed in kept for layer in layers]
        found = {cut: self._losses((_cut(sites, method, cut),), batches) for cut in cuts}
        typicals = {cut: typical(losses, self.is_rate) for cut, losses in found.items()}
        told = [cut for cut, value in typicals.items() if math.isfinite(value) and value > 0]
        if told:
            means = sum(mean(found[cut]) for cut in told)
            self.found.tail = max(means, 0.0) / sum(typicals[cut] for cut in told)
        return {cut: self.found.tail * value for cut, value in typicals.items()}

    def _timed(
        self, sites: TokenSites, method: str, legal: Sequence[int], levels: Sequence[int]
    ) -> Iterator[tuple[int, ...]]:
        """The schedules whose time is measured, the most telling first: many reductions that remove hardly anything,
        for what a reduction costs, then an even one, and cuts behind the first layer, for what tokens save."""
        yield sites.uniform(method, sites.removals[1])
        yield sites.uniform(method, _even_step(sites, method))
        for removed in levels:
            yield _removed(sites, Cut(legal[0], removed))

    def _best_method(self, sites: TokenSites) -> tuple[str, dict[tuple[int, ...], float]]:
        """The method that loses least when half of the tokens go evenly, among those that save time where most can be
        saved: when as many as possible go at once, behind the first layer. With it the time of that schedule; "" where
        none saves any."""
        steps = {method: sites.uniform(method, _even_step(sites, method)) for method in sites.legal}
        even = {method: (sites.candidate(method, steps[method]),) for method in sites.legal}
        losses = {method: self._loss(even[method], self._batches(_METHODS, len(even))) for method in even}
        ordered = sorted((m for m in losses if math.isfinite(losses[m])), key=lambda method: losses[method])
        told = ", ".join(f"{method} {losses[method]:.1e}" for method in ordered)
        if not ordered:
            self.found.notes.append("tokens: not offered, because the loss is not a number when half go evenly")
        slow: list[str] = []
        for method in ordered[:_METHODS_TIMED]:
            first = _removed(sites, Cut(sites.legal[method].index(True), sites.most(method, sites.tokens)))
            ratio = self._ratio((sites.candidate(method, first),))
            if ratio <= WORTH_IT:
                apart = f"; no time is saved by {', '.join(slow)}" if slow else ""
                self.found.notes.append(f"tokens: {method}; when half go evenly, the losses are {told}{apart}")
                return method, {first: ratio * self.trials.exact_seconds}
            slow.append(f"{method} ({ratio:.2f} of the exact model's time)")
        if slow:
            said = ", ".join(slow)
            self.found.notes.append(
                f"tokens: not offered, because no time is saved when as many as possible go at once by {said}"
            )
        return "", {}

    def _loss(self, composition: Composition, batches: int) -> float:
        return mean(self._losses(composition, batches))

    def _losses(self, composition: Composition, batches: int) -> Array:
        began = self.clock.spent
        losses = checked(self.trials.losses(composition, batches), self.limit)
        self.found.per_batch = (self.clock.spent - began) / batches
        return losses

    def _batches(self, part: float, evaluations: int) -> int:
        """How many batches each of some evaluations may take to keep a part of the time."""
        affordable = part * self.clock.seconds / (max(self.found.per_batch, 1e-4) * max(evaluations, 1))
        return int(np.clip(affordable, 1, self.trials.batches)) if self.found.per_batch else 1


def _even_step(sites: TokenSites, method: str) -> int:
    """How many tokens go behind each layer that allows it when half of all do."""
    return max(1, round((sites.tokens - sites.protected) / 2 / max(sum(sites.legal[method]), 1)))


def _cut(sites: TokenSites, method: str, cut: Cut) -> Candidate:
    return sites.candidate(method, _removed(sites, cut))


def _removed(sites: TokenSites, cut: Cut) -> tuple[int, ...]:
    return tuple(cut.removed if cut.layer == at else 0 for at in range(sites.layers))


def _not_offered(family: str, ratio: float) -> str:
    if math.isnan(ratio):
        return f"{family}: not offered, because the rewrites could not be made"
    return f"{family}: not offered, because the model takes {ratio:.2f} of the exact model's time with it everywhere"
