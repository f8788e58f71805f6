"""The report as text, and numbers as people read them."""

from __future__ import annotations

import math

import pytest

from regraft.report import Report, units
from regraft.report.budget import BudgetReport
from regraft.report.text import table, verdict
from tests.regraft.report.sample import sample


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0 s"),
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (4.56e-6, "4.56 µs"),
        (7e-9, "7.00 ns"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (3.14e-7, "3.1e-07"), (math.inf, "∞"), (math.nan, "not a number")],
)
def test_drift(value: float | None, text: str) -> None:
    assert units.drift(value) == text


def test_counts_and_ratios() -> None:
    assert units.count(2.5e9, "FLOP") == "2.50 GFLOP"
    assert units.count(12, "B") == "12.0 B"
    assert units.ratio(3, 2) == "1.50x"
    assert units.ratio(3, 0) == ""


def test_the_verdict_is_one_sentence() -> None:
    assert verdict(sample()) == (
        "3 rewrites made, 2 sites refused; end-to-end drift 4.2e-07; within the tolerance 1.0e-05; "
        "accuracy budget kl ≤ 0.001: 9.0e-04 on 64 held-out samples, 4.00 ms → 2.90 ms (1.38x); "
        "measured time 4.10 ms → 2.95 ms (1.39x)."
    )
    assert verdict(Report()) == "0 rewrites made, 0 sites refused."


def test_a_model_out_of_tolerance_is_told_so() -> None:
    assert "OUT OF the tolerance" in verdict(Report(end_to_end_drift=1.0, tolerance=1e-5))


def test_the_summary_tells_what_fired_what_was_refused_and_why() -> None:
    text = sample().summary()
    for part in (
        "Recognised: attention 0, rms_norm 3, rope 0",
        "fuse-rms-norm",
        "softmax runs over dimension -2",
        "modeling_llama.py:204 in forward",
        "recapture: input 0 has shape [2, 64]",
        "canonicalize  400 ms",
    ):
        assert part in text


def test_table_columns_are_aligned() -> None:
    assert table(("a", "b"), [("long", "1")]) == "  a     b\n  long  1"


def test_a_spent_budget_tells_decisions_and_what_was_predicted_beside_what_was_measured() -> None:
    text = " ".join(sample().summary().split())
    for part in (
        "tokens tome, 8+8 of 64 1.0e-04 500 µs",
        "predicted 2.0e-04 3.00 ms",
        "measured on calibration data 8.0e-04 2.90 ms",
        "measured on 64 samples held out 9.0e-04 (at most 9.5e-04 at 99%, look 2)",
        "exact 1.0e-14 4.00 ms",
        "2.90 ms chosen tokens: tome, 8+8 of 64; linear layers 0: bf16",
        "tokens: tome loses least when half go evenly",
    ):
        assert part in text


def test_a_budget_that_was_not_spent_says_why() -> None:
    refused = Report(budget=BudgetReport("kl", 0.1, refused="the calibration holds no batch"))
    kept = Report(budget=BudgetReport("kl", 0.1, kept_exact="nothing is faster"))
    assert "accuracy budget kl ≤ 0.1 refused: the calibration holds no batch" in verdict(refused)
    assert "accuracy budget kl ≤ 0.1 not spent: nothing is faster" in verdict(kept)
