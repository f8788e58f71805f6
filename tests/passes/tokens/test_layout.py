"""Layouts: where tokens and batch lie after views, checked against what the views do to indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.passes.tokens.layout import (
    Batch,
    Layout,
    Span,
    Torn,
    is_mixable,
    merged,
    permuted,
    reshaped,
    sizes,
    span_dim,
)

B, N = Batch(2), Span(0, 6)


def test_heads_come_apart_and_together() -> None:
    whole: Layout = ((B,), (N,), (12,))
    apart = reshaped(whole, [2, 6, 3, 4])
    assert apart == ((B,), (N,), (3,), (4,))
    assert reshaped(permuted(apart, [0, 2, 1, 3]), [6, 6, 4]) == ((B, 3), (N,), (4,))
    assert reshaped(whole, [12, 12]) == ((B, N), (12,))
    assert reshaped(((B, N), (12,)), [2, 1, 6, 12]) == ((B,), (), (N,), (12,))


def test_a_batch_of_one_is_not_lost() -> None:
    one = Batch(1)
    assert reshaped(((one,), (N,), (4,)), [1, 24]) == ((one,), (N, 4))
    assert reshaped(((one, N), (4,)), [6, 4]) == ((one, N), (4,))
    beside = reshaped(((N,), (one,), (2,), (4,)), [6, 8])
    assert beside == ((N,), (one, 8)) and reshaped(beside, [6, 1, 8]) == ((N,), (one,), (8,))
    assert is_mixable(beside[1]) and not is_mixable((B, 8)) and not is_mixable((one, N))


@pytest.mark.parametrize(
    ("shape", "axis"), [([2, 2, 3, 12], "tokens"), ([4, 3, 12], "tokens"), ([1, 2, 6, 12], None), ([5, 5], "tokens")]
)
def test_what_cuts_the_tokens_is_told(shape: list[int], axis: str | None) -> None:
    layout: Layout = ((B,), (N,), (12,))
    if axis is None:
        assert reshaped(layout, shape) == ((), (B,), (N,), (12,))
        return
    with pytest.raises(Torn) as torn:
        reshaped(layout, shape)
    assert torn.value.axis in (axis, "batch")


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.permutations([0, 1, 2, 3]), st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())
def test_a_layout_says_where_the_tokens_are(order: list[int], joins: list[bool], flat: bool) -> None:
    """The token of every element, followed through a permutation and a reshape that joins neighbouring dims."""
    factors = [B, N, 3, 5]
    tokens = torch.arange(6).view(1, 6, 1, 1).expand(2, 6, 3, 5).permute(order)
    layout: Layout = permuted(tuple((factor,) for factor in factors), order)
    shape = [int(tokens.shape[0])]
    for join, size in zip(joins, tokens.shape[1:], strict=True):
        shape = [*shape[:-1], shape[-1] * int(size)] if join else [*shape, int(size)]
    found = reshaped(layout, shape)
    assert sizes(found) == shape
    value = tokens.reshape(shape)
    dim = span_dim(found)
    assert dim is not None
    inner = found[dim]
    spread = value.unflatten(dim, sizes(tuple((factor,) for factor in inner)))
    place = dim % len(found) + inner.index(N)
    moved = spread.movedim(place, 0).reshape(6, -1)
    assert torch.equal(moved, torch.arange(6)[:, None].expand(moved.shape))


def test_neighbouring_plain_sizes_are_one() -> None:
    assert merged([2, 1, 3, N, 4, 5]) == (6, N, 20)
