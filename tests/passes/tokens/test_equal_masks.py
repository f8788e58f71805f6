"""Rows and columns of a mask that are called equal are equal, whatever the tensors say that it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.mask import parse, to_dense
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.passes.tokens.equal_masks import COLUMNS, ROWS, bias_keys, mask_keys
from regraft.passes.tokens.equal_places import EqualPlaces, first_places
from tests.passes.tokens.models import recognised, values

LENGTH = 8


class Masked(nn.Module):
    """An attention of eight tokens. Tensor 0 says of five tokens what the input does and is 0 for the rest; tensor 1
    numbers documents, alike in pairs; tensor 2 is a matrix whose rows and columns come twice."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, there: Tensor, matrix: Tensor) -> Tensor:
        padded, documents = F.pad(there, (0, 3)), there[:, :4].repeat_interleave(2, 1)
        dense = matrix.repeat_interleave(2, -1).repeat(1, 2, 1)[:, None]
        found: Tensor = ops.attention(x, x, x, [padded, documents, dense], scale=1.0, mask=self.mask)
        return found


def program(mask: str) -> Program:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, LENGTH, 4, generator=generator)
    there, matrix = (torch.randint(0, 2, size, generator=generator) for size in ((2, 5), (2, 4, 4)))
    return recognised(Masked(mask), (x, there, matrix))


def labels(mask: str, dim: int) -> tuple[int, ...] | None:
    found = program(mask)
    (attention,) = [node for node in found.graph.nodes if node.target is ops.attention]
    return first_places(mask_keys(EqualPlaces(found), attention, dim))


@pytest.mark.parametrize(
    ("mask", "columns"),
    [
        ("all", (0,) * 8),
        ("keys(0)", (0, 1, 2, 3, 4, 5, 5, 5)),
        ("prefix(key_len-2)", (0,) * 6 + (6, 6)),
        ("keys(0) | ~prefix(5)", (0, 1, 2, 3, 4, 5, 5, 5)),
        ("keys(1) | ~prefix(5)", (0, 0, 2, 2, 4, 5, 5, 5)),
        ("band(None,0) & prefix(5)", (0, 1, 2, 3, 4, 5, 5, 5)),
        ("keys(0) & prefix(3)", (0, 1, 2, 3, 3, 3, 3, 3)),
        ("same(1,1)", (0, 0, 2, 2, 4, 4, 6, 6)),
        ("dense(2)", (0, 0, 2, 2, 4, 4, 6, 6)),
        ("rows(0)", (0,) * 8),
        ("band(None,0)", None),
        ("chunk(4)", None),
        ("band(-1,1) | keys(0)", None),
    ],
)
def test_columns_of_a_mask(mask: str, columns: tuple[int, ...] | None) -> None:
    assert labels(mask, COLUMNS) == columns


def test_rows_of_a_mask() -> None:
    assert labels("keys(0) | ~prefix(5)", ROWS) == (0,) * 8
    assert labels("rows(0) & dense(2)", ROWS) is None
    assert labels("dense(2)", ROWS) == (0, 1, 2, 3, 0, 1, 2, 3)
    assert labels("band(None,0)", ROWS) is None


atoms = st.sampled_from(
    ["keys(0)", "keys(1)", "rows(0)", "same(0,1)", "dense(2)", "prefix(5)", "band(None,0)", "chunk(4)", "all", "none"]
)
masks = st.recursive(
    atoms,
    lambda inner: st.one_of(
        inner.map(lambda text: f"~({text})"),
        st.tuples(inner, st.sampled_from("&|"), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})"),
    ),
    max_leaves=4,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(masks)
def test_what_is_called_equal_is_equal(mask: str) -> None:
    found = program(mask)
    (attention,) = [node for node in found.graph.nodes if node.target is ops.attention]
    held, equal = values(found), EqualPlaces(found)
    tensors = [held[node] for node in arguments(attention)["mask_tensors"]]
    dense = to_dense(parse(arguments(attention)["mask"]), tensors, 2, 1, LENGTH, LENGTH)
    for dim in (ROWS, COLUMNS):
        for place, label in enumerate(first_places(mask_keys(equal, attention, dim)) or ()):
            assert torch.equal(dense.select(dim, place), dense.select(dim, label))


def test_a_bias_for_all_rows_is_the_same_for_each() -> None:
    class Biased(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (0, 2))[:, None, None]

    found = recognised(Biased(), (torch.randn(2, 3),))
    (bias,) = found.output_node.args[0]
    equal = EqualPlaces(found)
    assert list(bias_keys(equal, bias, ROWS, 4)) == [0] * 4
    assert first_places(bias_keys(equal, bias, COLUMNS, 5)) == (0, 1, 2, 3, 3)
