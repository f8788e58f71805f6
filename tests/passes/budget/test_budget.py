"""A budget says what may be lost; the bound of a mean covers the mean of what was not seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from regraft.passes.budget.budget import Budget
from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.estimate import estimate, median_bound, rate_bound, typical


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"metric": "perplexity"}, "the metric 'perplexity' is not known; give one of 'kl', 'top1'"),
        ({"metric": 3}, "the metric is a int"),
        ({"limit": -0.1}, "the limit -0.1 was given; give a number, 0 or more"),
        ({"limit": math.nan}, "give a number, 0 or more"),
        ({"limit": math.inf}, "give a number, 0 or more"),
        ({"limit": "0.01"}, "give a number, 0 or more"),
        ({"limit": True}, "give a number, 0 or more"),
        ({"metric": max, "output": "logits"}, "which sees all outputs"),
        ({"confidence": 1.0}, "give a number from 0.5 to 1"),
        ({"seconds": 0}, "give a number above 0"),
        ({"seed": "today"}, "give a whole number"),
        ({"families": ()}, "give names, or None for all"),
        ({"families": ("tokens", 3)}, "give names, or None for all"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(given: dict[str, object], reason: str) -> None:
    with pytest.raises(BudgetError, match=reason):
        Budget(**{"metric": "kl", "limit": 0.01, **given})  # type: ignore[arg-type]


def test_a_budget_tells_itself() -> None:
    assert str(Budget("kl", 0.01)) == "kl ≤ 0.01"
    assert str(Budget(max, 2)) == "max ≤ 2"


@pytest.mark.parametrize("confidence", [0.9, 0.99])
@pytest.mark.parametrize("count", [20, 120])
def test_the_bound_covers_the_true_mean_as_often_as_it_says(confidence: float, count: int) -> None:
    random = np.random.default_rng(0)
    even, skewed = random.normal(1.0, 0.5, (2000, count)), random.exponential(1.0, (2000, count))
    for drawn in (even, skewed):
        assert np.mean([estimate(losses, confidence).upper >= 1.0 for losses in drawn]) >= confidence - 0.01
    assert np.median([estimate(losses, confidence).upper for losses in even]) <= 1.0 + 3 / math.sqrt(count)


def test_the_bound_knows_that_a_few_large_losses_may_not_have_been_drawn() -> None:
    drawn = np.random.default_rng(0).lognormal(0.0, 1.5, (2000, 120))
    covered = np.mean([estimate(losses, 0.99).upper >= math.exp(1.125) for losses in drawn])
    assert covered >= 0.97  # 0.90 by Student's bound


@pytest.mark.parametrize(("errors", "count"), [(0, 30), (3, 60), (59, 60)])
def test_the_bound_of_a_rate_is_where_so_few_errors_become_unlikely(errors: int, count: int) -> None:
    rate = rate_bound(errors, count, 0.95)
    chance = sum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(errors + 1))
    assert chance == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("count", [9, 31])
def test_the_bound_of_a_median_covers_it_however_values_are_spread(count: int) -> None:
    drawn = np.exp(np.random.default_rng(0).normal(0.0, 2.0, (2000, count)))  # of median 1
    assert np.mean([median_bound(row, 0.99) >= 1.0 for row in drawn.tolist()]) >= 0.985
    assert median_bound([1.0] * 6, 0.99) == math.inf


def test_no_error_in_few_samples_shows_little() -> None:
    none = estimate(np.zeros(20), 0.99, rate=True)
    assert none.mean == 0.0 and none.upper == pytest.approx(1 - 0.01 ** (1 / 20))
    assert estimate(np.zeros(20), 0.99).upper == 0.0
    assert estimate(np.ones(5), 0.99, rate=True).upper == 1.0


def test_one_sample_or_none_and_what_is_no_number_show_nothing() -> None:
    assert not estimate(np.zeros(1), 0.99).within(1.0)
    assert not estimate(np.zeros(0), 0.99).within(1.0)
    assert not estimate(np.array([0.0, math.nan]), 0.99).within(math.inf)
    assert not estimate(np.array([0.0, math.inf]), 0.99).within(1.0)


def test_a_few_samples_near_a_decision_do_not_rank_rewrites() -> None:
    """Losses whose mean is that of few samples: the typical loss tells which of two rewrites moves outputs more."""
    rng = np.random.default_rng(0)
    sensitive = np.exp(rng.normal(0.0, 3.0, (400, 40)))  # how much each sample makes of a move, drawn for either model
    other = np.exp(rng.normal(0.0, 3.0, (400, 40)))
    right = {kind: np.mean([of(2 * a) > of(b) for a, b in zip(sensitive, other, strict=True)]) for kind, of in KINDS}
    assert right["typical"] > right["mean"] + 0.02
    assert typical(np.array([4.0, 16.0])) == 9.0 and typical(np.array([0.0, 1.0]), rate=True) == 0.5
    assert estimate(np.array([4.0, 16.0]), 0.99).typical == 9.0 and math.isnan(typical(np.zeros(0)))


KINDS = (("typical", typical), ("mean", np.mean))
