"""A softmax written out is softmax; what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical

X = numbers(2, 3, 4)


def shifted(maximum: Callable[[Tensor], Tensor], dim: int = -1) -> Callable[[Tensor], Tensor]:
    """exp(x - maximum) over its sum."""

    def function(x: Tensor) -> Tensor:
        raised = (x - maximum(x)).exp()
        return raised / raised.sum(dim, keepdim=True)

    return function


@pytest.mark.parametrize(
    "function",
    [
        shifted(lambda x: x.amax(-1, keepdim=True)),
        shifted(lambda x: x.max(dim=-1, keepdim=True)[0]),
        shifted(lambda x: x.max(-1, keepdim=True).values),
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    ],
)
def test_softmax_written_out(function: Callable[[Tensor], Tensor]) -> None:
    assert canonical(function, X, tolerance=1e-6) == "softmax.int(x0, -1)"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp() / x.exp().sum((-2, -1), keepdim=True),
        lambda x: x.exp() / x.sin().exp().sum(-1, keepdim=True),
        lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + 2),
        lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + x.exp()),
        lambda x: (x - x[..., :1]).exp() / ((x - x[..., :1]).exp().sum(-1, keepdim=True) + x[..., 1:2].exp()),
    ],
)
def test_other_quotients_stay(function: Callable[[Tensor], Tensor]) -> None:
    assert "softmax" not in canonical(function, X, tolerance=1e-6)


def with_zero(x: Tensor) -> Tensor:
    """exp(x) / (sum(exp(x)) + 1), the largest number or 0 taken off."""
    largest = x.amax(-1, keepdim=True).clamp(min=0)
    raised = (x - largest).exp()
    return raised / (raised.sum(-1, keepdim=True) + (-largest).exp())


def with_logit(x: Tensor) -> Tensor:
    """exp(x) / (sum(exp(x)) + exp(c)), the largest number taken off."""
    logit = torch.tensor([[[0.5]], [[-2.0]]])
    largest = torch.maximum(x.amax(-1, keepdim=True), logit)
    raised = (x - largest).exp()
    return raised / (raised.sum(-1, keepdim=True) + (logit - largest).exp())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1),
        with_zero,
        with_logit,
        lambda x: torch.cat([x[..., :1].sin(), x], -1).softmax(-1)[..., 1:],
        lambda x: torch.nn.functional.pad(x, (1, 0)).softmax(-1)[..., 1:],
        lambda x: torch.nn.functional.pad(x, (1, 0), value=0.5).softmax(-1)[..., 1:],
        lambda x: torch.nn.functional.pad(x, (0, 1)).softmax(-1)[..., :-1],
        lambda x: ((p := torch.nn.functional.pad(x, (0, 1), value=0.5)) - p.amax(-1, True)).softmax(-1)[..., :-1],
    ],
)
def test_a_column_that_only_takes_weight_stands_behind(function: Callable[[Tensor], Tensor]) -> None:
    text = canonical(function, X, tolerance=1e-6)
    assert text.splitlines()[-1].endswith(", -1, 0, 4)") and "softmax.int" in text and "exp" not in text.split("cat")[1]


def test_a_column_in_front_whose_weight_is_read_stays() -> None:
    def read(x: Tensor) -> Tensor:
        weights = torch.nn.functional.pad(x, (1, 0)).softmax(-1)
        return weights[..., 1:] + weights[..., :1]

    assert "pad" in canonical(read, X, tolerance=1e-6)


def test_a_padded_tensor_that_is_no_softmax_operand_stays() -> None:
    assert (
        canonical(lambda x: torch.nn.functional.pad(x, (0, 1)).softmax(1), X) == "pad(x0, [0, 1]); softmax.int(0, -2)"
    )
    assert "cat" not in canonical(lambda x: torch.nn.functional.pad(x, (0, 2)).softmax(-1), X)


def test_maximum_of_another_dim_stays() -> None:
    assert "softmax" not in canonical(shifted(lambda x: x.amax(1, keepdim=True)), X, tolerance=1e-6)
    assert torch.isfinite(X).all()


VALUES = numbers(2, 4, 5, seed=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, v: (x.exp() @ v) / x.exp().sum(-1, keepdim=True),
        lambda x, v: ((e := (x - x.amax(-1, keepdim=True)).exp()) @ v) / e.sum(-1, keepdim=True),
        lambda x, v: torch.log_softmax(x, -1).exp() @ v,
        lambda x, v: x.mT.softmax(-2).mT @ v,
        lambda x, v: (v.mT @ x.softmax(-1).mT).mT,
    ],
)
def test_softmax_is_over_the_last_dim_and_comes_before_the_product(function: Callable[..., Tensor]) -> None:
    assert canonical(function, X, VALUES, tolerance=1e-6) == "softmax.int(x0, -1); matmul(0, x1)"


def test_what_divides_a_product_is_the_sum_of_its_own_weights() -> None:
    text = canonical(lambda x, v: (x.exp() @ v) / x.sin().exp().sum(-1, keepdim=True), X, VALUES, tolerance=1e-6)
    assert "softmax" not in text


def test_a_sink_that_scales_the_output_is_a_column_that_takes_weight() -> None:
    def scaled(x: Tensor, v: Tensor) -> Tensor:
        logit = torch.tensor([[0.5], [-2.0]])
        share = (x.logsumexp(-1) - logit).sigmoid()
        return (x.softmax(-1) @ v) * share[..., None]

    text = canonical(scaled, X, VALUES, tolerance=1e-6)
    assert "logsumexp" not in text and "sigmoid" not in text and "cat" in text


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda weights: torch.nn.functional.dropout(weights, 0.1, training=False), id="dropout"),
        pytest.param(lambda weights: weights.clone(), id="decomposed dropout"),
    ],
)
def test_dropout_does_not_part_a_softmax_from_its_product(between: Callable[[Tensor], Tensor]) -> None:
    def turned(x: Tensor, v: Tensor) -> Tensor:
        return (between(x.softmax(-1)) @ v).mT

    text = canonical(turned, X, VALUES, tolerance=1e-6)
    assert text == "softmax.int(x0, -1); matmul(0, x1); permute(1, [0, 2, 1])"


@pytest.mark.parametrize(
    "empty",
    [
        lambda x: (x == -torch.inf).all(-1, keepdim=True),
        lambda x: ~(~(x == -torch.inf)).any(-1, keepdim=True),
    ],
)
def test_rows_without_a_finite_number_that_are_zero_make_a_safe_softmax(empty: Callable[[Tensor], Tensor]) -> None:
    x = X.masked_fill(X > 0.5, -torch.inf)
    x[0, 1] = -torch.inf
    found = canonical(lambda x: torch.where(empty(x), torch.zeros_like(x), x.softmax(-1)), x)
    assert found == "_safe_softmax(x0, -1)"
    assert "_safe" not in canonical(lambda x: torch.where(empty(x), torch.ones_like(x), x.softmax(-1)), x)
