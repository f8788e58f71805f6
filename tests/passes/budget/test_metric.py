"""Metrics follow their formulas, sample by sample, and refuse what they cannot compare."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.metric import METRICS, losses


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 6))
def test_kl_is_that_of_the_formula(seed: int, batch: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_, wanted = torch.randn(2, batch, 3, classes, generator=generator).double()
    p, q = wanted.exp() / wanted.exp().sum(-1, True), given_.exp() / given_.exp().sum(-1, True)
    expected = (p * (p / q).log()).sum(-1).mean(-1)
    assert torch.allclose(losses("kl", given_.float(), wanted.float()), expected, atol=1e-6)


def test_kl_of_classes_that_are_ruled_out_is_finite_unless_the_reference_takes_them() -> None:
    out = torch.tensor([[0.0, 1.0, -math.inf]])
    assert losses("kl", out, out).item() == 0.0
    assert losses("kl", out, torch.tensor([[0.0, 1.0, 2.0]])).item() == math.inf


def test_top1_counts_rows_whose_largest_entry_moved() -> None:
    reference = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    output = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [0.0, 9.0]]])
    assert losses("top1", output, reference).tolist() == [0.5, 0.0]


def test_cosine_and_relative_l2_know_their_right_angles() -> None:
    reference, output = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    assert losses("cosine", output, reference).tolist() == [1.0, 0.0]
    assert losses("relative_l2", output, reference).tolist() == pytest.approx([5 / 3, 0.5])


@pytest.mark.parametrize("metric", METRICS)
def test_equal_outputs_lose_nothing_zeros_included(metric: str) -> None:
    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    value[1] = 0.0
    assert losses(metric, value, value.clone()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_no_number_gives_no_number(metric: str) -> None:
    value = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    broken = value.clone()
    broken[0, 2] = math.nan
    found = losses(metric, broken, value)
    assert math.isnan(found[0]) and found[1] == 0.0


def test_the_worst_output_counts_unless_one_is_named() -> None:
    reference = {"logits": torch.ones(2, 3), "hidden": [torch.ones(2, 4), torch.tensor([1, 2])]}
    output = {"logits": torch.ones(2, 3), "hidden": [2 * torch.ones(2, 4), torch.tensor([1, 2])]}
    assert losses("relative_l2", output, reference).tolist() == [1.0, 1.0]
    assert losses("relative_l2", output, reference, "logits").tolist() == [0.0, 0.0]
    with pytest.raises(BudgetError, match=r"no floating-point output 'probabilities'; it has 'logits', 'hidden.0'"):
        losses("kl", output, reference, "probabilities")


@pytest.mark.parametrize("metric", METRICS)
def test_an_output_that_holds_nothing_is_not_compared(metric: str) -> None:
    output = {"logits": torch.eye(2), "past": torch.ones(2, 0, 4)}
    assert losses(metric, output, output).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("metric", "value", "reason"),
    [
        ("kl", torch.ones(3), "compares rows along the last dim"),
        ("kl", torch.tensor([1, 2]), "no floating-point output"),
        ("kl", torch.ones(2, 0), "no floating-point output"),
        ("kl", (torch.ones(2, 3), torch.ones(4, 3)), "no common batch"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(metric: str, value: object, reason: str) -> None:
    with pytest.raises(BudgetError, match=reason):
        losses(metric, value, value)


def test_a_function_is_given_the_outputs_and_may_answer_for_the_batch_or_for_each_sample() -> None:
    def largest(output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference).abs().amax(-1)

    output, reference = torch.tensor([[1.0, 5.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, 3.0]])
    assert losses(largest, output, reference).tolist() == [4.0, 1.0]
    assert losses(lambda o, r: 0.25, output, reference).tolist() == [0.25]


def test_a_function_that_writes_to_what_it_is_given_changes_no_later_loss() -> None:
    def greedy(output: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
        return float(reference["logits"].sub_(output["logits"]).abs().sum())

    output, reference = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 1.0]])
    for _ in range(2):
        assert losses(greedy, {"logits": output}, {"logits": reference}).tolist() == [4.0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda o, r: o, r"a tensor of shape \[2, 2\]"),
        (lambda o, r: {}["x"], "raised"),
        (lambda o, r: "much", "returned a str; return a number"),
        (lambda o, r: None, "returned a NoneType"),
        (lambda o, r: torch.tensor([1j]), "returned a tensor of torch.complex64"),
        (lambda o, r: torch.zeros(3), "returned 3 numbers for a batch of 2"),
    ],
)
def test_a_function_that_answers_otherwise_is_refused(answer: object, reason: str) -> None:
    value = torch.ones(2, 2)
    with pytest.raises(BudgetError, match=reason):
        losses(answer, value, value)  # type: ignore[arg-type]
