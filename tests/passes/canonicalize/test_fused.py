"""Fused operators of which the first result is read alone are the operators that they are parts of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical

X = numbers(2, 3, 4)
HEADS = tuple(numbers(2, 3, 5, 8, seed=seed) for seed in range(3))


def normed(x: Tensor) -> Any:
    """The norm, its means and its inverse spreads."""
    return torch.native_layer_norm(x, (4,), None, None, 1e-5)


def test_a_norm_whose_moments_nobody_reads() -> None:
    assert canonical(lambda x: normed(x)[0], X) == "layer_norm(x0, [4], None, None, 1e-05)"
    assert "native_layer_norm" in canonical(lambda x: normed(x)[:2], X)


def test_attention_whose_log_sums_nobody_reads() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = canonical(lambda q, k, v: flash(q, k, v, 0.0, True, scale=0.3)[0], *HEADS, tolerance=1e-6)
    assert found == "scaled_dot_product_attention(x0, x1, x2, None, 0.0, True, scale=0.3)"
