"""Measuring candidates one by one: what each loses on calibration data, and what each saves on the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from regraft.passes.budget.candidate import Candidate, Composition, composed
from regraft.passes.budget.token_sites import TokenSites
from regraft.passes.budget.token_table import Cut, table
from regraft.passes.budget.trials import Clock, Trials, mean
from regraft.solvers.schedule.tokens import TokenTable

#: A rewrite is worth offering when the model takes at most this part of the exact model's time with it everywhere.
WORTH_IT = 0.98
_LEVELS = (1 / 4, 1 / 2, 1 / 16)  # parts of the tokens that a cut removes, the most telling first
_TIMED_LAYERS = 3
_CALLS = 10  # of the exact model's time, that one measurement of a ratio takes with its build
_BUILD = 1.0  # seconds


@dataclass
class Measured:
    """Candidates that are worth it, with loss and seconds saved alone; the schedule tables; what was not offered."""

    loss: dict[Candidate, float] = field(default_factory=dict)
    saved: dict[Candidate, float] = field(default_factory=dict)
    tokens: TokenTable | None = None
    method: str = ""
    notes: list[str] = field(default_factory=list)


def measure(
    trials: Trials, candidates: Sequence[Candidate], sites: TokenSites | None, limit: float, clock: Clock
) -> Measured:
    """Measure everything that is offered, within about half of the clock's time."""
    found = Measured()
    began = clock.spent
    trials.losses((), 1)
    per_batch = max(clock.spent - began, 1e-4)
    for family in dict.fromkeys(candidate.family for candidate in candidates):
        _measure_family(trials, [c for c in candidates if c.family == family], limit, clock, per_batch, found)
    if sites is not None:
        _measure_tokens(trials, sites, clock, per_batch, found)
    elif not candidates:
        found.notes.append("no lossy rewrite applies to this model")
    return found


def _batches(trials: Trials, seconds: float, evaluations: int, per_batch: float) -> int:
    """How many batches each of some evaluations may take to fit into some seconds."""
    return int(np.clip(seconds / (per_batch * max(evaluations, 1)), 1, trials.batches))


def strongest(candidates: Sequence[Candidate]) -> Composition:
    """The last candidate of every site, those left out that an earlier one excludes."""
    last = {candidate.site: candidate for candidate in candidates}
    kept: list[Candidate] = []
    for candidate in last.values():
        if not any(candidate.site in other.excludes or other.site in candidate.excludes for other in kept):
            kept.append(candidate)
    return composed(kept)


def _measure_family(
    trials: Trials, own: Sequence[Candidate], limit: float, clock: Clock, per_batch: float, found: Measured
) -> None:
    family = own[0].family
    together = strongest(own)
    ratio = trials.ratio(together)
    if not ratio <= WORTH_IT:
        found.notes.append(_not_offered(family, ratio))
        return
    number = _batches(trials, 0.15 * clock.seconds, len(own), per_batch)
    share = (1.0 - ratio) / len(together)
    for candidate in own:
        if not clock.part(0.4):
            found.notes.append(f"{family}: time for measuring was over before {candidate.name}")
            break
        loss = mean(trials.losses((candidate,), number))
        if not loss <= limit:
            continue
        alone = trials.ratio((candidate,)) if len(together) > 1 else ratio
        # one of many saves less than the noise of a measurement: it is held between nothing and twice its share
        saved = float(np.clip(1.0 - alone, 0.1 * share, 2.0 * share)) if math.isfinite(alone) else 0.0
        found.loss[candidate], found.saved[candidate] = loss, saved * trials.exact_seconds


def _not_offered(family: str, ratio: float) -> str:
    if math.isnan(ratio):
        return f"{family}: not offered, because the rewrites could not be made"
    return f"{family}: not offered, because the model takes {ratio:.2f} of the exact model's time with it everywhere"


def _measure_tokens(trials: Trials, sites: TokenSites, clock: Clock, per_batch: float, found: Measured) -> None:
    method = _best_method(trials, sites, clock, per_batch, found)
    if not method:
        return
    legal = [layer for layer, allowed in enumerate(sites.legal[method]) if allowed]
    most = sites.most(method, sites.tokens)
    levels = sorted({max(1, min(most, round(part * sites.tokens))) for part in _LEVELS})
    evaluations = len(legal) * len(levels)
    if evaluations * per_batch > 0.3 * clock.seconds:
        levels = levels[-1:]
        evaluations = len(legal)
    number = _batches(trials, 0.25 * clock.seconds, evaluations, per_batch)
    losses: dict[Cut, float] = {}
    for removed in reversed(levels):
        for layer in legal:
            if losses and not clock.part(0.6):
                break
            cut = sites.candidate(method, _cut(sites, layer, removed))
            losses[Cut(layer, removed)] = mean(trials.losses((cut,), number))
    seconds = {
        cut: ratio * trials.exact_seconds
        for cut in _timed(legal, levels, trials.exact_seconds, clock)
        if math.isfinite(ratio := trials.ratio((sites.candidate(method, _cut(sites, cut.layer, cut.removed)),)))
    }
    found.method, found.tokens = method, table(sites, method, losses, seconds, trials.exact_seconds)


def _cut(sites: TokenSites, layer: int, removed: int) -> tuple[int, ...]:
    return tuple(removed if layer == at else 0 for at in range(sites.layers))


def _timed(legal: Sequence[int], levels: Sequence[int], exact: float, clock: Clock) -> list[Cut]:
    """The cuts whose time is measured: few where the model is slow. First and last layers tell the most."""
    affordable = int(0.2 * clock.seconds / (_BUILD + _CALLS * exact))
    layers = max(1, min(_TIMED_LAYERS, len(legal), affordable // max(len(levels), 1)))
    places = sorted({legal[round(at)] for at in np.linspace(0, len(legal) - 1, layers)})
    kept = levels if affordable >= len(places) * len(levels) else levels[-2:]
    return [Cut(layer, removed) for layer in places for removed in kept]


def _best_method(trials: Trials, sites: TokenSites, clock: Clock, per_batch: float, found: Measured) -> str:
    """The method that loses least when half of the tokens go, evenly over the layers, among those that save time."""
    number = _batches(trials, 0.1 * clock.seconds, len(sites.legal), per_batch)
    step = max(1, round((sites.tokens - sites.protected) / 2 / max(sites.layers, 1)))
    losses = {
        method: mean(trials.losses((sites.candidate(method, sites.uniform(method, step)),), number))
        for method in sites.legal
    }
    if not any(map(math.isfinite, losses.values())):
        found.notes.append("tokens: not offered, because the loss is not a number when half go evenly")
        return ""
    slow = []
    for method in sorted(losses, key=lambda method: losses[method]):
        if not math.isfinite(losses[method]):
            continue
        ratio = trials.ratio((sites.candidate(method, sites.uniform(method, step)),))
        if ratio <= WORTH_IT:
            others = ", ".join(f"{name} {value:.1e}" for name, value in losses.items() if name != method)
            found.notes.append(f"tokens: {method} loses least when half go evenly ({losses[method]:.1e}; {others})")
            return method
        slow.append(f"{method} {ratio:.2f}")
        if len(slow) == 2:  # the work of the layers is the same for all
            break
    found.notes.append(f"tokens: not offered, because no time is saved when half go evenly ({', '.join(slow)})")
    return ""
