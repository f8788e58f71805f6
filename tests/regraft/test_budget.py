"""``compile(budget=…)``: a model within the budget on data it was not fitted to, or the exact one and why.

Times are made up (fewer tokens are faster), so that nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft import Budget
from regraft.errors import OptionError
from regraft.rehearsal import Rehearsal
from regraft.report.html import render
from tests.regraft import budget_cases
from tests.regraft.budget_cases import Classifier, batch, nothing_is_timed

LIMIT = 0.02


def kl(model: Callable[..., Any], other: Callable[..., Any], x: Tensor) -> float:
    with torch.no_grad():
        wanted, given = model(x).double().log_softmax(-1), other(x).double().log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_timed(monkeypatch)


@pytest.fixture
def model() -> nn.Module:
    return Classifier().eval()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "regraft"):
        yield caplog


BATCHES = [batch(seed) for seed in range(1, 9)]


def spent(model: nn.Module, limit: float = LIMIT, **options: Any) -> Any:
    return regraft.compile(model, batch(0), budget=Budget("kl", limit, seconds=20), calibration=BATCHES, **options)


def test_the_model_is_faster_and_keeps_the_limit_on_data_that_it_has_not_seen(model: nn.Module) -> None:
    fast = spent(model)
    report = fast.report.budget
    assert report.spent and report.within_limit and report.seconds < report.exact_seconds
    assert 0 < report.held_out <= report.held_out_bound <= LIMIT and report.samples == 32
    assert [decision.site for decision in report.decisions] == ["tokens"]
    assert report.decisions[0].user_line.partition(":")[0] == budget_cases.__file__
    fresh = [kl(model, fast, batch(seed)) for seed in range(100, 110)]
    assert 0 < sum(fresh) / len(fresh) <= LIMIT
    assert {item.exactness for item in fast.report.applications} >= {"lossy"}
    assert fast.report.tolerance is None and fast.report.within_tolerance


def test_a_budget_of_zero_gives_the_exact_model_bit_by_bit(model: nn.Module) -> None:
    exact, fast = regraft.compile(model, batch(0)), spent(model, 0.0)
    assert torch.equal(exact(batch(50)), fast(batch(50)))
    assert fast.report.budget.kept_exact == "a budget of 0 leaves the exact model" and not fast.report.events
    assert torch.equal(regraft.compile(model, batch(0), budget=Budget("kl", 0))(batch(50)), exact(batch(50)))


def test_the_same_seed_gives_the_same_model_and_another_one_holds_out_other_batches(model: nn.Module) -> None:
    first, second = spent(model), spent(model)
    knobs = [[decision.knob for decision in made.report.budget.decisions] for made in (first, second)]
    assert knobs[0] == knobs[1]
    assert torch.equal(first(batch(50)), second(batch(50)))
    budget = Budget("kl", LIMIT, seconds=20, seed=1)
    other = regraft.compile(model, batch(0), budget=budget, calibration=BATCHES)
    assert other.report.budget.held_out != first.report.budget.held_out


def test_an_artifact_keeps_the_model_and_the_decisions(model: nn.Module, tmp_path: Path) -> None:
    fast = spent(model)
    fast.save(tmp_path / "model.regraft")
    loaded = regraft.load(tmp_path / "model.regraft")
    assert torch.equal(loaded(batch(50)), fast(batch(50)))
    assert loaded.report.budget == fast.report.budget
    fast(batch(50, size=3))  # exact code for another shape, used later than the one that the report tells of
    fast.save(tmp_path / "again.regraft")
    assert torch.equal(regraft.load(tmp_path / "again.regraft")(batch(50)), fast(batch(50)))


def test_keyword_inputs_a_generator_and_the_first_call(model: nn.Module) -> None:
    fast = regraft.compile(
        model, budget=Budget("kl", LIMIT, seconds=20), calibration=({"x": x} for x in BATCHES)
    )  # compiled when it is called
    assert fast.report.budget is None
    fast(x=batch(0))
    assert fast.report.budget.spent


def of_batches(*batches: Any) -> dict[str, Any]:
    return {"calibration": list(batches)}


def undefined(output: Tensor, reference: Tensor) -> float:
    return math.nan


def similarity(output: Tensor, reference: Tensor) -> float:
    return 1.0


def wrong(output: Tensor, reference: Tensor) -> Any:
    return output["logits"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (of_batches(), "the calibration holds no batch"),
        (of_batches(batch(1)), "the calibration holds one batch"),
        (of_batches(BATCHES[0], BATCHES[1], BATCHES[0].view(8, 16, 32)), "batches 0 and 2 are the same tensors"),
        (of_batches(*BATCHES[:2], *(x.clone() for x in BATCHES[:2])), "2 of 4 calibration batches hold the same"),
        (
            of_batches(batch(1), batch(2, size=4)),
            r"calibration batch 1 is float32\[4, 16, 32\], and the model was comp",
        ),
        (of_batches(batch(1), batch(2).double()), r"calibration batch 1 is float64\[8, 16, 32\]"),
        (of_batches((batch(1), batch(1))), r"calibration batch 0 is float32\[8, 16, 32\], float32\[8, 16, 32\]"),
        (of_batches(((batch(1),),)), r"compiled for float32\[8, 16, 32\], in other containers or memory formats"),
        (of_batches(*(batch(seed)[:1].repeat(8, 1, 1) for seed in range(4))), "28 of 32 calibration samples hold the"),
        ({"budget": Budget(undefined, 0.1)}, r"not a number \(NaN\) for the exact model"),
        ({"budget": Budget(similarity, 0.1)}, "the exact model has a loss of 1, and the limit is 0.1"),
        ({"budget": Budget(wrong, 0.1)}, "the metric wrong raised"),
        ({"budget": Budget("kl", 0.1, output="logits")}, "no floating-point output 'logits'; it has 'output'"),
        ({"budget": Budget("top1", 0.01)}, "32 samples cannot show a loss of at most 0.01"),
    ],
)
def test_what_cannot_be_spent_is_refused_and_the_exact_model_remains(
    model: nn.Module, told: pytest.LogCaptureFixture, options: dict[str, Any], reason: str
) -> None:
    given = {"budget": Budget("kl", LIMIT), "calibration": BATCHES, **options}
    fast = regraft.compile(model, batch(0), **given)
    report = fast.report.budget
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.refused)
    assert not report.spent and report.within_limit
    assert torch.equal(fast(batch(50)), regraft.compile(model, batch(0))(batch(50)))
    assert [event.kind for event in fast.report.events] == ["budget"]
    assert "the model is the exact one" in told.messages[0]


def test_too_few_samples_are_refused(model: nn.Module) -> None:
    x = batch(0, size=2)
    fast = regraft.compile(model, x, budget=Budget("kl", 0.1), calibration=[batch(1, 2), batch(2, 2)])
    assert "4 samples, of which 2 are held out; give at least 8" in fast.report.budget.refused


def test_samples_are_counted_however_deep_they_lie(model: nn.Module) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, scale: Tensor, given: dict[str, Tensor]) -> Tensor:
            return scale * self.inner(given["x"])  # type: ignore[no-any-return]

    calls = [(torch.ones(1), {"x": x}) for x in BATCHES]
    budget = Budget("kl", LIMIT, seconds=20)
    fast = regraft.compile(Nested().eval(), (torch.ones(1), {"x": batch(0)}), budget=budget, calibration=calls)
    assert fast.report.budget.spent and fast.report.budget.samples == 32


def test_samples_that_are_given_again_in_other_batches_are_refused(model: nn.Module) -> None:
    again = torch.cat(BATCHES[:4])[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    options = of_batches(*BATCHES[:4], *again.split(8))
    report = regraft.compile(model, batch(0), budget=Budget("kl", LIMIT), **options).report.budget
    assert report.refused.startswith("32 of 64 calibration samples hold the same numbers as others")


def test_a_model_that_cannot_be_compiled_says_what_became_of_its_budget(model: nn.Module) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + torch.randn_like(x))  # type: ignore[no-any-return]

    fast = regraft.compile(Noisy().eval(), batch(0), budget=Budget("kl", LIMIT), calibration=BATCHES)
    assert not fast.entries and fast.report.budget.refused.startswith("the model is not compiled (")


def test_a_limit_that_no_plot_reaches_is_spent_and_told(model: nn.Module) -> None:
    fast = spent(model, 1e308)
    assert fast.report.budget.spent and "limit 1e+308" in render(fast.report)


def test_a_budget_that_nothing_keeps_leaves_the_exact_model_and_says_why(model: nn.Module) -> None:
    fast = spent(model, 1e-12)
    assert "no rewrite keeps kl ≤ 1e-12" in fast.report.budget.kept_exact
    assert torch.equal(fast(batch(50)), regraft.compile(model, batch(0))(batch(50)))


def test_a_model_that_may_be_slower_than_the_exact_one_is_not_returned(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the turns were slower: the median tells nothing."""
    monkeypatch.setattr(Rehearsal, "ratios_of", lambda self, executable, thorough=True: [0.9] * 6 + [1.1] * 5)
    fast = spent(model)
    assert "takes 0.90 of the exact model's time, 1.10 at a confidence of 0.99" in fast.report.budget.kept_exact
    assert torch.equal(fast(batch(50)), regraft.compile(model, batch(0))(batch(50)))


def test_a_fault_of_the_search_leaves_the_exact_model(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise IndexError("no such layer")

    monkeypatch.setattr("regraft.budget.search", broken)
    fast = spent(model)
    assert "the search failed (IndexError: no such layer)" in fast.report.budget.refused
    assert torch.equal(fast(batch(50)), regraft.compile(model, batch(0))(batch(50)))


def test_a_shape_that_was_not_calibrated_gets_exact_code(model: nn.Module) -> None:
    fast = spent(model)
    x = batch(50, size=3)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert [event.kind for event in fast.report.events] == ["recapture", "budget"]
    assert kl(model, fast, batch(51)) > 1e-9  # the first shape keeps its own
    assert fast.report.budget.spent and fast.report.budget.inputs == "float32[8, 16, 32]"


def test_a_refusal_for_one_shape_makes_way_for_what_another_one_was_given(model: nn.Module) -> None:
    fast = regraft.compile(model, batch(0, 3), budget=Budget("kl", LIMIT, seconds=20), calibration=BATCHES)
    assert fast.report.budget.refused
    fast(batch(0))
    assert fast.report.budget.spent and fast.report.budget.inputs == "float32[8, 16, 32]"
    fast(batch(0, 4))
    assert fast.report.budget.spent


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"budget": 0.01, "calibration": BATCHES}, r"a float was given as the budget; give a regraft.Budget"),
        ({"budget": Budget("kl", 0.1)}, "a budget was given without calibration data"),
        ({"calibration": BATCHES}, "calibration was given without a budget"),
        (
            {"budget": Budget("kl", 0.1), "calibration": BATCHES[0]},
            "the calibration is a Tensor; give a list of batches",
        ),
        ({"budget": Budget("kl", 0.1), "calibration": [3]}, "calibration batch 0 is a int"),
        ({"budget": Budget("kl", 0.1), "calibration": [{"x": BATCHES[0], 1: 2}]}, "batch 0 is a dict with the key 1"),
        (
            {"budget": Budget("kl", 0.1), "calibration": BATCHES, "experts": "plan.json"},
            "budget and experts were given",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(model: nn.Module, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        regraft.compile(model, batch(0), **options)


def test_calibration_that_fails_on_the_way_is_told(model: nn.Module) -> None:
    def failing() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise OSError("the disk is gone")

    with pytest.raises(OptionError, match=r"the calibration failed at batch 1 \(OSError: the disk is gone\)"):
        regraft.compile(model, batch(0), budget=Budget("kl", 0.1), calibration=failing())


def test_a_family_that_nothing_of_the_model_belongs_to_is_told(model: nn.Module) -> None:
    budget = Budget("kl", LIMIT, families=("token",))
    report = regraft.compile(model, batch(0), budget=budget, calibration=BATCHES).report.budget
    assert "token: no rewrite of this family applies to this model; those that do are" in report.kept_exact
