"""Predicates as FlexAttention's mask functions, and which sites it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings

from regraft.codegen.triton.attention_flex import flex_refuses, mask_rule
from regraft.codegen.triton.attention_spec import site_spec
from regraft.codegen.triton.mask_operands import atoms
from regraft.ir.mask import Bits, Predicate, to_dense
from regraft.ir.nodes import arguments
from tests.codegen.triton.test_lower import Site
from tests.ir.mask.test_predicate import BATCH, HEADS, predicates, sizes, tensors_for
from tests.support import captured


@settings(max_examples=60, deadline=None)
@given(predicates, sizes)
def test_a_rule_shows_the_pairs_of_its_predicate(predicate: Predicate, drawn: tuple[int, int, int]) -> None:
    rows, columns, seed = drawn
    assume(not any(isinstance(atom, Bits) for atom in atoms([predicate])))
    tensors = tensors_for(rows, columns, seed)
    rule = mask_rule(predicate, tensors, BATCH, HEADS, rows, columns)
    indices = torch.meshgrid(*map(torch.arange, (BATCH, HEADS, rows, columns)), indexing="ij")
    seen = rule(*indices).expand(BATCH, HEADS, rows, columns)
    assert torch.equal(seen, to_dense(predicate, tensors, BATCH, HEADS, rows, columns))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sinks": torch.zeros(2)}, "no sinks"),
        ({"mask": "keys(0)", "masks": 1}, "a row without keys is nan here"),
        ({"mask": "band(None,0)", "mask_fill": -1.0}, "no number at masked scores"),
        ({"mask": "bits(0) | band(0,0)", "bits": True, "empty_rows": "zero"}, "bits of words"),
        ({"head_dim": 8}, "heads of 16 numbers or more"),
        ({}, None),
    ],
)
def test_what_it_cannot_express_is_refused(options: dict[str, Any], reason: str | None) -> None:
    dim = options.pop("head_dim", 16)
    inputs = [torch.randn(2, 2, 6, dim) for _ in range(3)]
    if options.pop("masks", 0):
        inputs.append(torch.ones(2, 6, dtype=torch.bool))
    if options.pop("bits", False):
        inputs.append(torch.ones(2, 6, 1, dtype=torch.int64))
    program = captured(Site(**options), tuple(inputs))
    (site,) = (arguments(node) for node in program.graph.nodes if "attention" in str(node.target))
    found = flex_refuses(site_spec(site), site)
    assert found is None if reason is None else found is not None and reason in found
