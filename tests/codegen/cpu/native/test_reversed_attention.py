"""The kernel of reversed attention against its formula in fp64, over sizes that are no multiple of anything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.cpu.native_operators import reversed_native
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native

pytestmark = needs_native


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """What each key receives, in fp64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    scores = query @ key.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return scores.softmax(-1).mT @ value


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(1, 150),
    keys=st.integers(1, 150),
    head_dim=st.integers(1, 40),
    value_dim=st.sampled_from([1, 5, 16, 20, 64, 70]),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_each_key_receives_what_the_queries_send(
    batch: int, heads: int, length: int, keys: int, head_dim: int, value_dim: int, softcap: float
) -> None:
    query, key = draw(batch, heads, length, head_dim), draw(batch, heads, keys, head_dim, seed=1)
    value = draw(batch, heads, length, value_dim, seed=2)
    found = reversed_native(query, key, value, None, 0.4, softcap)
    assert relative_l2(found, formula(query, key, value, 0.4, softcap)) < 2e-6


def test_operands_are_read_where_they_lie() -> None:
    whole = draw(2, 70, 3, 4, 20)  # what a merged projection makes: batch, length, parts, heads, size
    query, key, value = (whole[:, :, part].transpose(1, 2) for part in range(3))
    assert relative_l2(reversed_native(query, key, value, None, 0.3, 0.0), formula(query, key, value, 0.3)) < 2e-6


@pytest.mark.parametrize("size", [(2, 3, 70, 1), (2, 1, 70, 1), (1, 3, 1, 1)], ids=str)
def test_gates_weaken_what_is_sent(size: tuple[int, ...]) -> None:
    query, key, value = draw(2, 3, 70, 8), draw(2, 3, 9, 8, seed=1), draw(2, 3, 70, 20, seed=2)
    gates = draw(*size, seed=3)
    found = reversed_native(query, key, value, gates, 0.3, 0.0)
    assert relative_l2(found, formula(query, key, value * gates, 0.3)) < 2e-6


def test_no_query_sends_nothing() -> None:
    found = reversed_native(draw(1, 2, 0, 8), draw(1, 2, 5, 8), draw(1, 2, 0, 16), None, 1.0, 0.0)
    assert found.shape == (1, 2, 5, 16) and not found.any()


def test_large_scores_do_not_overflow() -> None:
    query, key, value = draw(1, 1, 70, 8) * 300, draw(1, 1, 9, 8, seed=1), draw(1, 1, 70, 16, seed=2)
    assert relative_l2(reversed_native(query, key, value, None, 1.0, 0.0), formula(query, key, value, 1.0)) < 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_no_number_reaches_every_key_and_no_other_head(bad: float) -> None:
    query, key, value = draw(1, 2, 70, 8), draw(1, 2, 9, 8, seed=1), draw(1, 2, 70, 16, seed=2)
    query[0, 0, 3, 0] = bad
    found = reversed_native(query, key, value, None, 1.0, 0.0)
    assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()
