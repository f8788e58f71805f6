"""Masks as bits: what attention computes with them is what it computes with the predicate's dense mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native.mask import mask_bits
from regraft.codegen.cpu.native_operators import attend_native
from regraft.ir.mask import parse, to_dense
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.native.test_attention import draw, formula
from tests.codegen.cpu.support import needs_native

pytestmark = needs_native

#: Tensors by number: 0 and 1 are numbers of rows and of keys, 2 padding, 3 any mask, 4 words of a tree.
MASKS = (
    "same(0,1)",
    "band(None,0) & (~same(0,1) | band(0,0))",
    "keys(2) & (dense(3) | (same(0,1) & ~band(-3,3)))",
    "~(dense(3) & keys(2)) | prefix(2)",
    "heads(1,2) | (same(0,1) & dense(3))",
    "bits(4) | ~(same(0,1) | rows(0) & dense(3))",
    "none & same(0,1)",
)


def tensors(batch: int, heads: int, length: int, keys: int, kind: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def whole(*sizes: int, most: int = 3) -> Tensor:
        return torch.randint(-1, most, sizes, generator=generator)

    numbers = [whole(batch, length).to(kind), whole(1, keys).to(kind), whole(batch, 1, 1, keys, most=1)]
    return [*numbers, whole(1, heads, length, keys, most=1) != 0, whole(batch, length, 1, most=1 << 40)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    text=st.sampled_from(MASKS),
    batch=st.integers(1, 2),
    heads=st.sampled_from([1, 2]),
    length=st.sampled_from([1, 7, 50, 120]),
    keys=st.sampled_from([1, 15, 16, 33, 130, 700, 1100]),
    kind=st.sampled_from([torch.int64, torch.int32, torch.float32]),
    seed=st.integers(0, 99),
)
def test_bits_hide_what_the_mask_hides(
    text: str, batch: int, heads: int, length: int, keys: int, kind: torch.dtype, seed: int
) -> None:
    masks = tensors(batch, heads, length, keys, kind, seed)
    bits = mask_bits(NATIVE.library(), parse(text), masks, heads, length, keys)
    seen = to_dense(parse(text), masks, batch, heads, length, keys)
    query, key = draw(batch, heads, length, 5), draw(batch, heads, keys, 5, seed=1)
    value = draw(batch, heads, keys, 4, seed=2)
    found = attend_native(query, key, value, None, None, None, 0.3, 0.0, None, bits, "zero")
    assert relative_l2(found.double(), formula(query, key, value, seen)) < 2e-6


def test_numbers_that_differ_in_high_bits_alone_are_not_the_same() -> None:
    rows, keys = torch.tensor([[5]]), torch.tensor([[5, 5 + (1 << 32), 5]])
    bits = mask_bits(NATIVE.library(), parse("same(0,1)"), [rows, keys], 1, 1, 3)
    value = torch.eye(3)[None, None]
    zeros = torch.zeros(1, 1, 3, 3)
    found = attend_native(zeros[:, :, :1], zeros, value, None, None, None, 1.0, 0.0, None, bits, "zero")
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.5, 0.0, 0.5]))


def test_bits_that_a_mask_does_not_tell_apart_are_one_row() -> None:
    padding = torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert mask_bits(NATIVE.library(), parse("~keys(0)"), [padding], 4, 50, 3).shape[:3] == (2, 1, 1)
    assert mask_bits(NATIVE.library(), parse("same(0,0)"), [padding], 4, 3, 3).shape[:3] == (2, 1, 3)


def test_blocks_of_keys_that_no_row_sees_are_not_read() -> None:
    """Values there may be anything."""
    length = 1300
    far = torch.zeros(1, 1, 1, length, dtype=torch.bool)
    far[..., 600:640], far[..., 900:910] = True, True
    query, key, value = draw(1, 1, 9, 8), draw(1, 1, length, 8, seed=1), draw(1, 1, length, 8, seed=2)
    value[:, :, :512], value[:, :, 720:880], value[:, :, 1024:] = torch.nan, torch.nan, torch.nan
    bits = mask_bits(NATIVE.library(), parse("dense(0)"), [far], 1, 9, length)
    found = attend_native(query, key, value, None, None, None, 0.3, 0.0, None, bits, "zero")
    seen = far.expand(1, 1, 9, length)
    assert relative_l2(found.double(), formula(query, key, value.nan_to_num(), seen)) < 2e-6
