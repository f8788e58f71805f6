"""Arithmetic: numbers stand second, squares are powers, operations without effect are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.passes.canonicalize.pipeline import canonicalize
from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical, form
from tests.support import AsModule

X = numbers(2, 3, 4)
MASK = X > 0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: 2 * x, "mul.Tensor(x0, 2)"),
        (lambda x: 1 + x, "add.Tensor(x0, 1)"),
        (lambda x: 1 - x, "rsub.Scalar(x0, 1)"),
        (lambda x: x - 1, "sub.Tensor(x0, 1)"),
        (lambda x: torch.true_divide(x, 8.0), "div.Tensor(x0, 8.0)"),
        (lambda x: torch.divide(x, 8.0), "div.Tensor(x0, 8.0)"),
        (lambda x: torch.multiply(x, x + 1), "add.Tensor(x0, 1); mul.Tensor(x0, 0)"),
        (lambda x: torch.rsub(x, x.sin()), "sin(x0); sub.Tensor(0, x0)"),
        (lambda x: (x > 0) == torch.tensor(False), "gt.Scalar(x0, 0); eq.Scalar(0, 0)"),
        (lambda x: x < torch.tensor(0.5), "lt.Scalar(x0, 0.5)"),
        (lambda x: x.masked_fill(x > 0, torch.tensor(-1.0)), "gt.Scalar(x0, 0); where.ScalarSelf(0, -1.0, x0)"),
        (lambda x: x * x, "pow.Tensor_Scalar(x0, 2)"),
        (lambda x: x.square(), "pow.Tensor_Scalar(x0, 2)"),
        (lambda x: x**2, "pow.Tensor_Scalar(x0, 2)"),
        (lambda x: (x + 0).sin(), "sin(x0)"),
        (lambda x: (x - 0).sin(), "sin(x0)"),
        (lambda x: (x * 1.0).sin(), "sin(x0)"),
        (lambda x: (x / 1).sin(), "sin(x0)"),
        (lambda x: (x / 0.0, x / -0.0), "div.Tensor(x0, 0.0); div.Tensor(x0, -0.0)"),  # no call for both
    ],
)
def test_spelling(function: Callable[[Tensor], object], expected: str) -> None:
    assert canonical(function, X) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.add(x, x.sin(), alpha=2), "sin(x0); mul.Tensor(0, 2); add.Tensor(x0, 1)"),
        (lambda x: torch.sub(x, x.sin(), alpha=0.5), "sin(x0); mul.Tensor(0, 0.5); sub.Tensor(x0, 1)"),
        (lambda x: torch.rsub(x, x.sin(), alpha=3), "sin(x0); mul.Tensor(x0, 3); sub.Tensor(0, 1)"),
    ],
)
def test_what_a_sum_scales_is_a_product(function: Callable[[Tensor], object], expected: str) -> None:
    assert canonical(function, X, tolerance=1e-6) == expected


def test_a_scale_that_would_change_the_type_stays() -> None:
    added = torch.arange(4)
    assert "alpha=0.5" in canonical(lambda x: torch.add(x, added, alpha=0.5), X.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_tensor_without_dims_is_a_number(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    third = torch.tensor(1 / 3, dtype=dtype).item()  # as rounded to the tensor's own type
    assert canonical(lambda x: x * torch.full([], 1 / 3, dtype=dtype), x) == f"mul.Tensor(x0, {third})"
    assert canonical(lambda x: x / torch.tensor(8.0), x) == "div.Tensor(x0, 8.0)"


def test_constant_tensor_that_decides_the_type_stays() -> None:
    assert "full" in canonical(lambda x: x * torch.full([], 0.5), torch.arange(3))


def test_a_square_of_truth_values_is_no_power() -> None:
    program, session = capture(AsModule(lambda m: m * m), (MASK,)), Session()
    canonicalize(program, session)
    assert form(program) == "mul.Tensor(x0, x0)" and not session.log.of("square-of-product").rolled_back


def test_one_that_changes_the_type_stays() -> None:
    assert canonical(lambda x: x * 1.0, torch.arange(3)) == "mul.Tensor(x0, 1.0)"
    assert canonical(lambda x: x / 1, torch.arange(3)) == "div.Tensor(x0, 1)"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, m: x.masked_fill(m, -1.0), "where.ScalarSelf(x1, -1.0, x0)"),
        (lambda x, m: x.masked_fill(m, torch.full([], -1.0)), "where.ScalarSelf(x1, -1.0, x0)"),
        (
            lambda x, m: x.masked_fill(m[0, 0], -1e4),
            "select.int(x1, -3, 0); select.int(0, -2, 0); where.ScalarSelf(1, -10000.0, x0)",
        ),
        (lambda x, m: torch.where(m, x, -1.0), "where.ScalarOther(x1, x0, -1.0)"),
        (lambda x, m: m & m.logical_not(), "logical_not(x1); bitwise_and.Tensor(x1, 0)"),
        (lambda x, m: m | m.logical_not(), "logical_not(x1); bitwise_or.Tensor(x1, 0)"),
    ],
)
def test_masks(function: Callable[..., object], expected: str) -> None:
    assert canonical(function, X, MASK) == expected


def test_masked_fill_keeps_the_type_of_integers_and_of_truth_values() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert canonical(lambda x, m: x.masked_fill(m, 7), ids, ids > 3) == "where.ScalarSelf(x1, 7, x0)"
    assert canonical(lambda x, m: x.masked_fill(m, 7.0), ids, ids > 3) == "where.ScalarSelf(x1, 7, x0)"
    assert canonical(lambda x, m: x.masked_fill(m, 0), ids > 1, ids > 3) == "where.ScalarSelf(x1, False, x0)"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.softmax(2), "softmax.int(x0, -1)"),
        (lambda x: torch._softmax(x, 1, False), "softmax.int(x0, -2)"),
        (lambda x: x.softmax(1, torch.float64), "softmax.int(x0, -2, torch.float64)"),
        (lambda x: x.mean(2, keepdim=True), "mean.dim(x0, [-1], True)"),
        (lambda x: x.mean((0, -1)), "mean.dim(x0, [-3, -1])"),
        (lambda x: x.sum(1), "sum.dim_IntList(x0, [-2])"),
        (lambda x: x.amax(1), "amax(x0, [-2])"),
        (lambda x: x.cumsum(1), "cumsum(x0, -2)"),
        (lambda x: torch.cat([x, x], 1), "cat([x0, x0], -2)"),
        (lambda x: torch.cat([x, x]), "cat([x0, x0], -3)"),
        (lambda x: torch.concat([x, x], 2), "cat([x0, x0], -1)"),
        (lambda x: torch.stack([x, x], 1), "stack([x0, x0], -3)"),
        (lambda x: torch.stack([x, x], -1), "stack([x0, x0], -1)"),
        (lambda x: x.log_softmax(0), "log_softmax.int(x0, -3)"),
        (lambda x: x.var(2, correction=0), "var.correction(x0, [-1], correction=0)"),
    ],
)
def test_dims_count_from_the_end(function: Callable[[Tensor], Any], expected: str) -> None:
    assert canonical(function, X) == expected
