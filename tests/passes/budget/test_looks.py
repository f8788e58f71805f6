"""Looking at held-out data until something passes: all looks together keep the confidence that was asked for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from regraft.passes.budget.budget import Budget
from regraft.passes.budget.estimate import confidence_of_look, estimate, is_clearly_less
from regraft.passes.budget.search import search
from tests.passes.budget.test_search import SITES, Arithmetic

CONFIDENCE, RUNS, LOOKS = 0.9, 2000, 8


def test_the_parts_that_looks_spend_add_up_to_one() -> None:
    spent = [1.0 - confidence_of_look(0.99, look) for look in range(1, 1000)]
    assert math.isclose(spent[0], 0.005) and all(later < earlier for earlier, later in itertools.pairwise(spent))
    assert math.isclose(sum(spent), 0.01 * (1 - 1 / 1000))


def passes(confidences: list[float]) -> float:
    """The part of the runs in which one of some rewrites passes, where each loses just more than the limit allows."""
    drawn = np.random.default_rng(0).normal(1.0, 0.3, (RUNS, len(confidences), 100))
    held = [
        any(estimate(losses, sure).within(1.0) for losses, sure in zip(looks, confidences, strict=True))
        for looks in drawn
    ]
    return sum(held) / RUNS


def test_many_looks_do_not_pass_oftener_than_one_may() -> None:
    deviation = math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / RUNS)
    assert passes([confidence_of_look(CONFIDENCE, look) for look in range(1, LOOKS + 1)]) <= 1 - CONFIDENCE + deviation
    assert passes([CONFIDENCE] * LOOKS) > 3 * (1 - CONFIDENCE)  # where every look has all of it


@pytest.mark.parametrize("drift", [1.0, 1.5, 1e6])
def test_the_search_asks_for_more_at_every_look(drift: float) -> None:
    model, budget = Arithmetic(drift=drift), Budget("kl", 5e-3)
    found = search(model, budget, [], SITES)
    looked = [tried for tried in found.tried if tried.held_out is not None]
    assert found.looks == len(looked) >= 1 and (found.chosen is None) == (drift > 2)
    wanted = {
        look: {estimate(model.held_out(tried.composition), confidence_of_look(0.99, look)) for tried in looked}
        for look in range(1, found.looks + 1)
    }
    given = [tried.held_out for tried in looked]
    assert all(any(held in wanted[look] for held in given) for look in wanted)


def test_a_loss_is_clearly_less_by_more_than_what_the_samples_vary_by() -> None:
    drawn = np.random.default_rng(0).gamma(0.3, 1.0, 200)  # a few samples have most of the loss
    other = np.random.default_rng(1).gamma(0.3, 1.0, 200)
    assert is_clearly_less(0.9 * drawn, drawn) and not is_clearly_less(drawn, 0.9 * drawn)
    assert not is_clearly_less(drawn, other) and not is_clearly_less(other, drawn)
    assert not is_clearly_less(drawn, drawn) and not is_clearly_less(drawn[:1], drawn)
