"""Spending an accuracy budget on a model that was compiled exactly: what ``compile(budget=…)`` does."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

from sympy import Symbol  # type: ignore[import-untyped]
from torch import nn

from regraft.build import Build, Toolchain, build
from regraft.calibration import Call, covered, split
from regraft.ir.capture_error import first_line
from regraft.ir.driver import Session
from regraft.ir.nodes import user_line
from regraft.ir.program import Program
from regraft.passes.base import Pass
from regraft.passes.budget.budget import Budget
from regraft.passes.budget.candidate import Candidate, NotOffered, rewrites
from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.estimate import Estimate, confidence_of_look, estimate, median_bound
from regraft.passes.budget.metric import metric_name
from regraft.passes.budget.neighbours import Space
from regraft.passes.budget.offers import OFFERS
from regraft.passes.budget.probing import WORTH_IT
from regraft.passes.budget.search import Found, search
from regraft.passes.budget.token_sites import TokenSites, find_token_sites
from regraft.passes.budget.trials import Clock, Tried
from regraft.passes.pipeline import default_pipeline, finishing, recognising
from regraft.passes.refused import Refused
from regraft.rehearsal import Rehearsal
from regraft.report.budget import BudgetPoint, BudgetReport, Decision
from regraft.solvers.schedule.points import front

__all__ = ["Budget", "BudgetError", "Spending", "spend"]

#: The family of token schedules.
TOKENS = "tokens"
_SURE = 0.99  # that the finished model is faster than the exact one
_LOG = logging.getLogger("regraft")


@dataclass(frozen=True)
class Spending:
    """A budget and the batches to spend it by."""

    budget: Budget
    calls: tuple[Call, ...]

    def unspent(self, reason: str) -> BudgetReport:
        """What is told where there is nothing to spend the budget on: the model is not compiled."""
        return _report(self.budget, refused=f"the model is not compiled ({reason})")


def spend(spending: Spending, exact: Build, model: nn.Module, target: str, verify: str) -> tuple[Build, BudgetReport]:
    """The fastest model within the budget that was found, with what was found out; ``exact`` itself where there is
    none, or where the budget or the calibration is refused."""
    budget, started = spending.budget, time.perf_counter()
    if budget.limit == 0:
        return exact, _report(budget, kept_exact="a budget of 0 leaves the exact model")
    try:
        made, told = _spend(spending, exact, model, target, verify)
    except BudgetError as error:
        made, told = exact, _report(budget, refused=str(error))
    except Exception as error:  # a fault of ours must not take the exact model away
        _LOG.debug("spending a budget failed", exc_info=True)
        made, told = exact, _report(budget, refused=f"the search failed ({first_line(error)}); please report it")
    own = sum(made.phases.values()) if made is not exact else 0.0
    made.phases["accuracy budget"] = time.perf_counter() - started - own
    return made, told


def _spend(spending: Spending, exact: Build, model: nn.Module, target: str, verify: str) -> tuple[Build, BudgetReport]:
    budget, clock = spending.budget, Clock.after(spending.budget.seconds)
    calibration = split(list(spending.calls), exact.entry, budget.seed)
    sizes = covered(list(spending.calls), exact.entry)
    recognised = exact.before.copy()
    recognising().run(recognised, Session(verify="off"))
    rehearsal = Rehearsal(recognised, finishing(target), exact.entry, model, calibration, budget)
    offered = _offered(recognised, target)
    candidates = [candidate for candidate in offered.candidates if budget.allows(candidate.family)]
    sites = offered.sites if budget.allows(TOKENS) else None
    found = search(rehearsal, budget, candidates, sites, clock, offered.notes(budget))
    if found.chosen is None:
        return exact, _told(budget, found, rehearsal, None, None)
    made = _finished(exact, found.chosen, target, verify)
    sure = confidence_of_look(budget.confidence, found.looks)  # the look that chose it, by the model as it is built
    losses = rehearsal.held_out_by(made.entry.executable)
    held = estimate(losses, sure, budget.counts_errors(losses))
    ratios = rehearsal.ratios_of(made.entry.executable)
    ratio, bound = median(ratios), median_bound(ratios, _SURE)
    if not (held.within(budget.limit) and ratio <= WORTH_IT and bound < 1.0):
        found.why = (  # it may have other kernels than when it was tried
            f"the finished model loses {held.mean:.2g} on held-out data and takes {ratio:.2f} of the exact model's "
            f"time, {bound:.2f} at a confidence of {_SURE:g}, more than when it was tried"
        )
        return exact, _told(budget, found, rehearsal, None, None)
    found.chosen.seconds = ratio * rehearsal.exact_seconds
    told = _told(budget, found, rehearsal, found.chosen, held)
    return made, replace(told, covers=_kept_to(sizes, made, exact)) if sizes else told


def _kept_to(sizes: dict[Symbol, tuple[int, int]], made: Build, exact: Build) -> str:
    """Let a model with symbolic sizes serve those that were calibrated, the exact one the others; what to say of it."""
    shown = [
        f"{least}{f' to {most}' if most > least else ''} in {exact.entry.guard.place_of(symbol)}"
        for symbol, (least, most) in sizes.items()
    ]
    made.entry.guard.narrow(sizes)
    made.beside = exact.entry
    return f"the loss was measured for sizes {', '.join(shown)}; others get exact code"


@dataclass
class _Offered:
    """What may be done to a program: candidates and the token axis; the families that have none, and why; what became
    of offers that failed."""

    candidates: list[Candidate] = field(default_factory=list)
    sites: TokenSites | None = None
    declined: list[NotOffered] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def notes(self, budget: Budget) -> list[str]:
        """What to say of the families that a budget allows, and that nothing of this model belongs to."""
        offered = {candidate.family for candidate in self.candidates} | ({TOKENS} if self.sites is not None else set())
        known = ", ".join(sorted(offered)) or "none"
        unknown = set(budget.families or ()) - offered - {item.family for item in self.declined}
        return [
            *self.failed,
            *(str(item) for item in self.declined if budget.allows(item.family)),
            *(
                f"{family}: no rewrite of this family applies to this model; those that do are {known}"
                for family in sorted(unknown)
            ),
        ]


def _offered(recognised: Program, target: str) -> _Offered:
    """What all offers say of a program; one that fails offers nothing."""
    made = _Offered()
    for offer in OFFERS:
        try:
            for item in list(offer(recognised, target)):
                if isinstance(item, Candidate):
                    made.candidates.append(item)
                else:
                    made.declined.append(item)
        except Exception as error:
            made.failed.append(_failed(getattr(offer, "__name__", str(offer)), error))
    try:
        made.sites = find_token_sites(recognised)
    except Refused as refused:
        line = user_line(refused.node) if refused.node is not None else ""
        made.declined.append(NotOffered(TOKENS, f"{refused.reason}{f' ({line})' if line else ''}"))
    except Exception as error:
        made.failed.append(_failed(TOKENS, error))
    return made


def _failed(offer: str, error: Exception) -> str:
    """What to say of an offer that failed: it reads programs that nobody has seen."""
    _LOG.debug("an offer failed", exc_info=error)
    return f"{offer}: offered nothing, because it failed: {first_line(error)}"


def _finished(exact: Build, chosen: Tried, target: str, verify: str) -> Build:
    """The chosen model, built as any other; it is compared with the original by the budget's metric instead."""
    lossy: tuple[Pass, ...] = rewrites(chosen.composition)
    toolchain = Toolchain(pipeline=lambda name: default_pipeline(name, tokens=lossy))
    return build(exact.before.copy(), target, verify, toolchain, None)


def _report(budget: Budget, **given: Any) -> BudgetReport:
    return BudgetReport(
        metric=metric_name(budget.metric), limit=float(budget.limit), confidence=float(budget.confidence), **given
    )


def _told(
    budget: Budget, found: Found, rehearsal: Rehearsal, chosen: Tried | None, held: Estimate | None
) -> BudgetReport:
    common: dict[str, Any] = {
        "points": _points(found, rehearsal.exact_seconds, chosen),
        "notes": list(found.measured.notes),
        "exact_seconds": rehearsal.exact_seconds,
        "search_seconds": found.seconds,
        "stop": found.stop,
        "gap": max((choice.gap for choice in found.predicted), default=0.0),
    }
    if chosen is None or held is None or chosen.loss is None:
        return _report(budget, kept_exact=found.why, **common)
    return _report(
        budget,
        decisions=_decisions(found, chosen, rehearsal.exact_seconds),
        predicted_loss=chosen.predicted_loss,
        loss=chosen.loss.mean,
        held_out=held.mean,
        held_out_bound=held.upper,
        samples=held.samples,
        looks=found.looks,
        predicted_seconds=chosen.predicted_seconds,
        seconds=chosen.seconds,
        **common,
    )


def _decisions(found: Found, chosen: Tried, exact_seconds: float) -> list[Decision]:
    space = Space(found.measured, None, exact_seconds)
    made = []
    for candidate in chosen.composition:
        loss, seconds = space.predict((candidate,))
        made.append(Decision(candidate.site, candidate.knob, candidate.user_line, loss, exact_seconds - seconds))
    return made


def _points(found: Found, exact_seconds: float, chosen: Tried | None) -> list[BudgetPoint]:
    """The exact model, what the solvers predicted and what was tried, with the best of each kind marked."""
    exact = found.exact.mean if found.exact is not None else None
    made = [BudgetPoint("exact", "exact", 0.0, exact_seconds, exact, None, exact_seconds, best=True)]
    for choice in found.predicted:  # a front already
        name = "; ".join(choice.picks.values()) or "exact"
        made.append(BudgetPoint(name, "predicted", choice.loss, choice.seconds, best=True))
    tried = [_point(item, item is chosen) for item in found.tried]
    best = {known.place for known in front(_known(tried))}
    return [*made, *(replace(point, best=place in best) for place, point in enumerate(tried))]


class _Known(NamedTuple):
    """What is known of a point, for the front."""

    place: int
    loss: float
    seconds: float


def _known(points: list[BudgetPoint]) -> list[_Known]:
    return [_Known(place, point.known_loss, point.known_seconds) for place, point in enumerate(points)]


def _point(item: Tried, chosen: bool) -> BudgetPoint:
    return BudgetPoint(
        name=item.name,
        kind="tried",
        predicted_loss=item.predicted_loss,
        predicted_seconds=item.predicted_seconds,
        loss=item.loss.mean if item.loss is not None else None,
        held_out=item.held_out.mean if item.held_out is not None else None,
        seconds=item.seconds if item.seconds is not None and math.isfinite(item.seconds) else None,
        chosen=chosen,
    )
