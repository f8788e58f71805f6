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
        lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1),
    ],
)
def test_other_quotients_stay(function: Callable[[Tensor], Tensor]) -> None:
    assert "softmax" not in canonical(function, X, tolerance=1e-6)


def test_maximum_of_another_dim_stays() -> None:
    assert "softmax" not in canonical(shifted(lambda x: x.amax(1, keepdim=True)), X, tolerance=1e-6)
    assert torch.isfinite(X).all()
