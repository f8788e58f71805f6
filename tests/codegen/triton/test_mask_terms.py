"""Masks as unions of intervals and tests mean what the predicate means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from regraft.codegen.triton.mask_operands import clash, mask_operands
from regraft.codegen.triton.mask_terms import MOST_TERMS, everywhere, mask_terms
from regraft.ir.mask import And, Everything, Or, Predicate, parse, simplify, to_dense
from tests.ir.mask.test_predicate import BATCH, HEADS, predicates, sizes, tensors_for


@given(predicates, sizes)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_terms_are_the_predicate(predicate: Predicate, size: tuple[int, int, int]) -> None:
    rows, columns, seed = size
    parts = mask_terms(simplify(predicate))
    assert 1 <= len(parts.terms) <= MOST_TERMS
    everything = Everything()
    unions = tuple(And((everything, everything, *term.bounds, *term.tests)) for term in parts.terms)
    rebuilt = And((everything, Or((*unions, *unions)), *parts.tests))
    tensors = tensors_for(rows, columns, seed)
    shape = (BATCH, HEADS, rows, columns)
    assert torch.equal(to_dense(rebuilt, tensors, *shape), to_dense(predicate, tensors, *shape))


@pytest.mark.parametrize(
    ("mask", "terms", "exact"),
    [
        ("band(None,0)", 1, True),
        ("band(None,0) & lengths(0)", 1, True),
        ("band(None,0) & keys(0)", 1, False),
        ("prefix(4) & band(None,0) | band(-9,0)", 2, True),
        ("band(None,0) & (heads(0,2) | band(-9,None))", 2, True),
        ("prefix(1) | band(2,3) | band(7,8) | ~prefix(90)", 1, False),
    ],
)
def test_what_tiles_of_keys_can_be_skipped_for(mask: str, terms: int, exact: bool) -> None:
    parts = mask_terms(simplify(parse(mask)))
    assert (len(parts.terms), parts.exact) == (terms, exact)


def test_what_all_terms_share_is_tested_once() -> None:
    parts = mask_terms(parse("keys(0) & (band(-9,0) | prefix(4) & band(None,0))"))
    assert [str(test) for test in parts.tests] == ["keys(0)"]
    assert not any(term.tests for term in parts.terms)


def test_a_number_at_masked_scores_leaves_no_tile_out() -> None:
    assert everywhere(parse("band(None,0)")).terms[0].bounds == ()


def test_a_tensor_that_is_read_as_two_shapes_is_refused() -> None:
    assert clash(mask_operands([parse("keys(0) & rows(1)")])) is None
    assert clash(mask_operands([parse("keys(0) & dense(0)")])) == "tensor 0 of the mask is read as keys and as pairs"
