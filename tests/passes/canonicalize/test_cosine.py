"""Cosine similarity over the last dim is written out, over another dim it stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.passes.canonicalize.support import canonical

X, Y = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), torch.randn(2, 5, 6)


def test_over_the_last_dim() -> None:
    text = canonical(lambda x, y: F.cosine_similarity(x, y, dim=-1), X, Y, tolerance=1e-6)
    assert "cosine" not in text and text.endswith("[-1])")


def test_a_length_of_zero_is_raised_to_eps() -> None:
    x = X.clone()
    x[0, 0] = 0
    assert "cosine" not in canonical(
        lambda x, y: F.cosine_similarity(x, y, dim=2, eps=1e-3), x * 1e-4, Y, tolerance=1e-6
    )


def test_over_another_dim_it_stays() -> None:
    assert "cosine_similarity" in canonical(lambda x, y: F.cosine_similarity(x, y, dim=1), X, Y, tolerance=1e-6)
