"""Spans say what the dense mask says, row by row, and are few."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from regraft.ir.mask import parse, to_dense
from regraft.ir.mask.predicate import Predicate
from regraft.ir.mask.spans import MOST_SPANS, has_spans, spans
from tests.ir.mask.test_predicate import BATCH, HEADS, predicates, sizes, tensors_for


def as_mask(found: torch.Tensor, keys: int) -> torch.Tensor:
    """``[batch or 1, heads or 1, rows, keys]``."""
    place = torch.arange(keys)
    return ((place >= found[0, ..., None]) & (place < found[1, ..., None])).any(-2)


@given(predicates, sizes)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_spans_are_the_dense_mask(p: Predicate, size: tuple[int, int, int]) -> None:
    rows, columns, seed = size
    tensors = tensors_for(rows, columns, seed)
    found = spans(p, HEADS, rows, columns, tensors)
    if not has_spans(p):
        assert found is None
        return
    wanted = to_dense(p, tensors, BATCH, HEADS, rows, columns)
    assert found is not None  # seven keys have four runs at most
    assert torch.equal(as_mask(found, columns).expand_as(wanted), wanted)
    start, end = found
    assert bool((end[..., :-1] < start[..., 1:]).logical_or(start[..., 1:] == columns).all()), (
        "sorted, and not touching"
    )


@pytest.mark.parametrize(
    ("text", "count", "heads"),
    [
        ("band(None,0)", 1, 1),
        ("band(None,0) & (prefix(4) | band(-7,None))", 2, 1),
        ("band(None,0) & (heads(2,4) | band(-7,None))", 1, 4),
        ("band(None,0) | chunk(8)", 1, 1),
        ("~band(-3,3)", 2, 1),
    ],
)
def test_masks_of_positions_need_few(text: str, count: int, heads: int) -> None:
    found = spans(parse(text), 4, 64, 64)
    assert found is not None
    assert found.shape == (2, 1, heads, 64, count)


def test_packed_documents_are_one_span_a_row_and_mixed_ones_are_listed_or_left_dense() -> None:
    packed = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 1, 1]])
    found = spans(parse("same(0,0)"), 1, 6, 6, [packed])
    assert found is not None
    assert found.shape == (2, 2, 1, 6, 1)
    assert found[0, 0, 0, :, 0].tolist() == [0, 0, 2, 2, 2, 5]
    alternating = torch.arange(6)[None] % 2
    listed = spans(parse("same(0,0)"), 1, 6, 6, [alternating])
    assert listed is not None and listed.shape[-1] == 3
    longer = torch.arange(4 * MOST_SPANS)[None] % 2
    assert spans(parse("same(0,0)"), 1, longer.shape[1], longer.shape[1], [longer]) is None


def test_a_part_with_more_intervals_than_the_limit_is_not_met_with_others() -> None:
    given = [torch.arange(40)[None] % 2]
    for limit, found in ((None, True), (20, True), (19, False)):
        both = spans(parse("keys(0) & band(-3,0)"), 1, 40, 40, given, dense=True, limit=limit)
        assert (both is not None) == found
