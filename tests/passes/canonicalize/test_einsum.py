"""Einsums without rows, columns or contraction are products too; where that would round otherwise, they are matmul."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.canonicalize.support import canonical


def numbers(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("equation", "left", "right", "product"),
    [
        ("ti,taoi->tao", numbers(2, 4), numbers(2, 3, 5, 4), "matmul"),
        ("tai,ta->ti", numbers(2, 3, 4), numbers(2, 3), "matmul"),
        ("bi,bi->b", numbers(2, 4), numbers(2, 4), "sum.dim_IntList"),
        ("bi,bi->b", numbers(2, 4, dtype=torch.bfloat16), numbers(2, 4, dtype=torch.bfloat16), "matmul"),
        ("i,j->ij", numbers(3), numbers(4), "mul.Tensor"),
        ("bi,bij->bji", numbers(2, 3), numbers(2, 3, 4), "mul.Tensor"),
    ],
)
def test_einsum_of_vectors_is_a_product(equation: str, left: Tensor, right: Tensor, product: str) -> None:
    text = canonical(lambda a, b: torch.einsum(equation, a, b), left, right, tolerance=1e-6)
    assert product in text and "einsum" not in text
