"""Tensors of one number that are made like another read nothing of it but what an input has, too."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.passes.canonicalize.support import canonical

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_type_and_device_are_read_of_an_input() -> None:
    text = canonical(lambda x: (x @ x.mT).cos().new_full((5, 5), -1.0).triu(1), X)
    assert "matmul" not in text


def test_another_type_is_not_read_of_an_input() -> None:
    assert "to.dtype" in canonical(lambda x: x.double().new_ones(5), X)


def test_a_mask_in_the_shape_of_scores_needs_no_scores() -> None:
    def mask(x: Tensor) -> Tensor:
        return torch.ones_like(torch.einsum("bid,bjd->bij", x, x) * 2, dtype=torch.bool).tril()

    assert "matmul" not in canonical(mask, X)


def test_what_is_no_product_stays_the_shape() -> None:
    assert "zeros_like" in canonical(lambda x: torch.zeros_like(x.cos()) + x, X)
