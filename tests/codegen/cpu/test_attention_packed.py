"""Packed attention natively: what the definition gives sample by sample, for any lengths and interval masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.codegen.cpu.attention_packed import attend_packed, packed_spans
from regraft.codegen.cpu.lower import lower
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.ops.attention_packed import reference
from regraft.ir.ops.pack_tokens import reference as pack
from regraft.passes.pipeline import default_pipeline
from regraft.passes.tokens.unpad import Unpad
from tests.codegen.cpu.support import needs_native
from tests.passes.tokens.models import TEXT_KINDS, outputs, relative, texts, tiny
from tests.passes.tokens.test_reduce import MeanOfTokens
from tests.passes.tokens.test_unpad import MASKS


@needs_native
@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=6),
    st.sampled_from(["all", "band(None,0)", "band(-3,3)", "band(1,None)"]),
    st.booleans(),
    st.integers(0, 1),
    st.sampled_from([None, -3e38]),
)
def test_each_sample_is_its_own(
    lengths: list[int], mask: str, scattered: bool, prefix: int, fill: float | None
) -> None:
    length = max(max(lengths), 1)
    there = torch.arange(length) < torch.tensor(lengths)[:, None]
    if scattered:
        there = there[:, torch.randperm(length, generator=torch.Generator().manual_seed(1))]
    index, _, offsets, present = pack(there, prefix, 0)
    generator = torch.Generator().manual_seed(0)
    tokens = index.shape[1]
    query = torch.randn(1, tokens, 4, 8, generator=generator).transpose(1, 2)
    key, value = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    places = query, key, value, index, offsets, present
    found = attend_packed(
        *places, packed_spans(*places[3:], length, mask, fill is not None), length, mask, 0.3, fill, "zero", 0.0
    )
    torch.testing.assert_close(
        found, reference(*places, length, 0.3, mask, fill, "zero", 0.0), rtol=1e-4, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_an_unpadded_program_computes_the_same_lowered_whatever_is_padded(kind: str) -> None:
    given_texts = texts((16, 10, 3))
    program = capture(MeanOfTokens(tiny(kind)), tuple(given_texts.values()))
    before = program.copy()
    default_pipeline("cpu", tokens=(Unpad(),)).run(program, Session(verify="off"))
    lowered = lower(program)
    for name, mask in MASKS.items():
        args = given_texts["input_ids"], mask
        assert relative(lowered(*args)[0], outputs(before, *args)[0]) <= 1e-5, name
