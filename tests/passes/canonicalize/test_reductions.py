"""Reductions: means, kept dims and moments have one spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical

X = numbers(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.sum(-1, keepdim=True) / 4, "mean.dim(x0, [-1], True)"),
        (lambda x: x.sum(-1) * 0.25, "mean.dim(x0, [-1], False)"),
        (lambda x: x.sum((1, 2)) / 12, "mean.dim(x0, [-2, -1], False)"),
        (lambda x: x.mean(-1).unsqueeze(-1), "mean.dim(x0, [-1], True)"),
        (lambda x: x.sum(2)[..., None], "sum.dim_IntList(x0, [-1], True)"),
        (lambda x: x.amax(-1).view(2, 3, 1), "amax(x0, [-1], True)"),
        (
            lambda x: torch.rsqrt(x.mean(-1) + 1)[..., None],
            "mean.dim(x0, [-1], True); add.Tensor(0, 1); rsqrt(1)",
        ),
        (
            lambda x: x.var(-1, correction=0)[..., None],
            "var.correction(x0, [-1], correction=0, keepdim=True)",
        ),
        (
            lambda x: torch.var_mean(x, -1, correction=0, keepdim=True),
            "var.correction(x0, [-1], correction=0, keepdim=True); mean.dim(x0, [-1], True)",
        ),
    ],
)
def test_spelling(function: Callable[[Tensor], Tensor], expected: str) -> None:
    assert canonical(function, X, tolerance=1e-6) == expected


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (lambda x: x.sum(-1) / 3, "sum"),
        (lambda x: x.mean(-1)[:, None], "unsqueeze"),
        (lambda x: x.mean(1)[..., None], "unsqueeze"),
        (lambda x: ((m := x.mean(-1)), m[..., None]), "unsqueeze"),
        (lambda x: (x.long() + 1).sum(-1) / 4, "sum"),
    ],
)
def test_what_only_looks_alike_stays(function: Callable[[Tensor], Tensor], stays: str) -> None:
    assert stays in canonical(function, X, tolerance=1e-6)
