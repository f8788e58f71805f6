"""A tensor that is written part by part is made of the parts, where these cover it."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.passes.canonicalize.support import canonical

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_parts_side_by_side_are_joined() -> None:
    def function(x: Tensor) -> Tensor:
        made = torch.empty(2, 5, 8)
        made[..., 6:] = x[..., :1]  # is spread over two columns
        made[..., :6] = x.cos()
        return made

    text = canonical(function, X)
    assert "cat" in text and "slice_scatter" not in text


def test_every_other_entry_is_stacked_with_its_neighbour() -> None:
    def function(x: Tensor) -> Tensor:
        made = torch.empty_like(x, dtype=torch.bfloat16)
        made[..., 0::2], made[..., 1::2] = x[..., 0::2].cos(), x[..., 1::2].sin()
        return made

    text = canonical(function, X)
    assert "stack" in text and text.count("to.dtype") == 1 and "slice_scatter" not in text


def test_what_is_not_written_stays() -> None:
    def function(x: Tensor) -> Tensor:
        made = x.clone()
        made[..., :2], made[..., 3:] = 0.0, x[..., 1:4]
        return made

    assert "slice_scatter" in canonical(function, X)


def test_parts_that_overlap_stay() -> None:
    def function(x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[..., :4], made[..., 3:] = x[..., :4].cos(), x[..., 3:]
        return made

    assert "slice_scatter" in canonical(function, X)
