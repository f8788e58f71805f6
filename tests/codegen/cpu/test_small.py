"""Copies of permuted dims and many small products have kernels of their own on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.native_operators import batched_native, reshaped_native
from tests.codegen.cpu.support import needs_native
from tests.support import captured

pytestmark = needs_native
SIZES = st.sampled_from((1, 2, 5, 9, 16, 17, 64, 70))


@st.composite
def strided(draw: Any, sizes: tuple[int, ...]) -> Tensor:
    """A tensor whose dims lie in memory in any order, perhaps with gaps."""
    order = draw(st.permutations(range(len(sizes))))
    steps = [draw(st.sampled_from((1, 1, 2))) for _ in sizes]
    held = torch.randn(
        [sizes[dim] * steps[dim] for dim in order], generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
    )
    whole = held.permute([order.index(dim) for dim in range(len(sizes))])
    return whole[tuple(slice(None, None, step) for step in steps)]


@st.composite
def factors(draw: Any) -> tuple[Tensor, Tensor]:
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    rows, depth, columns = draw(SIZES), draw(SIZES), draw(SIZES)
    once = [draw(st.booleans()) for _ in leading]
    broadcast = tuple(1 if one else size for one, size in zip(once, leading, strict=True))
    return draw(strided((*leading, rows, depth))), draw(strided((*broadcast, depth, columns)))


@settings(max_examples=60, deadline=None)
@given(pair=factors())
def test_products_of_any_strides(pair: tuple[Tensor, Tensor]) -> None:
    left, right = pair
    torch.testing.assert_close(
        batched_native(left, right).double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.lists(st.sampled_from((1, 2, 3, 8, 17)), min_size=1, max_size=5))
def test_copies_of_any_strides(data: Any, sizes: list[int]) -> None:
    x = data.draw(strided(tuple(sizes)))
    assert torch.equal(reshaped_native(x, [-1]), x.reshape(-1))


def cut(x: Tensor, side: int = 4) -> Tensor:
    """``[batch, windows, pixels, width]`` of an image ``[batch, width, height, height]``."""
    batch, width, height = x.shape[:3]
    cells = x.reshape(batch, width, height // side, side, height // side, side).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(batch, -1, side * side, width)


def joined(parts: Tensor, side: int = 4) -> Tensor:
    """The inverse, of ``[batch, windows, width, pixels]``."""
    batch, count, width = parts.shape[:3]
    along = int(count**0.5)
    parts = parts.reshape(batch, along, along, width, side, side).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(batch, width, along * side, along * side)


IMAGE, MEMBER = torch.randn(3, 32, 32, 32), torch.randn(3, 64, 16, 9)


def both_ways(x: Tensor, member: Tensor) -> Tensor:
    return joined((cut(x).mT @ member) @ member.mT)


def read_elsewhere(x: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pixels = cut(x)
    parts = (pixels.mT @ member) @ member.mT
    return joined(parts), pixels.softmax(-2), parts.sum()


def two_widths(x: Tensor, member: Tensor) -> Tensor:
    """Rows, depth and columns that are two dims each."""
    other = cut(x.flip(1)[:, :16])
    return joined((cut(x).mT @ other) @ other.mT)


def turned_behind(x: Tensor, member: Tensor) -> Tensor:
    """Rows and columns of the last product are exchanged before it is put together."""
    return joined((member @ (cut(x).mT @ member).mT).mT)


@pytest.mark.parametrize(
    ("function", "copies"), [(both_ways, 0), (read_elsewhere, 2), (two_widths, 0), (turned_behind, 0)]
)
def test_windows_of_an_image_are_multiplied_where_they_lie(function: Any, copies: int) -> None:
    executable = lower(captured(function, (IMAGE, MEMBER)))
    names = [getattr(node.target, "__name__", "") for node in executable.module.graph.nodes]
    assert "windows_native" in names and names.count("reshaped_native") <= copies
    wanted = function(IMAGE, MEMBER)
    for result, exact in zip(
        executable(IMAGE, MEMBER), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    ):
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-3)


def test_large_products_and_copies_of_rows_stay_pytorchs() -> None:
    heads = captured(lambda x: x.permute(0, 2, 1, 3).reshape(2, 64, -1), (torch.randn(2, 8, 64, 64),))
    assert "reshaped_native" not in str(lower(heads).module.graph)
    product = captured(torch.matmul, (torch.randn(8, 128, 128), torch.randn(8, 128, 128)))
    assert "batched_native" not in str(lower(product).module.graph)


def chosen(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def test_rows_by_number_are_copied_whole() -> None:
    x, index = torch.randn(3, 50, 192)[..., 64:], torch.randint(0, 50, (3, 60))
    executable = lower(captured(chosen, (x, index)))
    assert "gather_rows" in str(executable.module.graph)
    assert torch.equal(executable(x, index)[0], chosen(x, index))
    turned = torch.randn(3, 128, 50).mT  # columns that lie apart
    assert torch.equal(executable(turned, index)[0], chosen(turned, index))


@pytest.mark.parametrize("number", [-1, 50])
def test_a_number_out_of_range_raises(number: int) -> None:
    x, index = torch.randn(3, 50, 128), torch.randint(0, 50, (3, 60))
    executable = lower(captured(chosen, (x, index)))
    index[2, 7] = number
    with pytest.raises(IndexError, match=f"index {number} is out of bounds for dimension 1 with size 50"):
        executable(x, index)


def test_a_number_for_each_element_stays_pytorchs() -> None:
    x, index = torch.randn(3, 50, 128), torch.randint(0, 50, (3, 60, 128))
    assert "gather_rows" not in str(lower(captured(lambda x, i: x.gather(1, i), (x, index))).module.graph)
