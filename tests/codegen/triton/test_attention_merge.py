"""Merging attention over parts of the keys, interpreted, against attention over all of them in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.triton.attention_merge import MergeSpec, emit_merge
from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported
from regraft.codegen.triton.load import load_kernel
from tests.codegen.triton.formula import agree, draw, formula, operands
from tests.codegen.triton.interpreted import Run

FP32, FP16 = torch.float32, torch.float16
TILES = (8, 4, 1)


def merged(parts: Tensor, part_lse: Tensor, sinks: Tensor | None = None, empty: float = math.nan) -> Any:
    """Output and log-sum-exp of the whole, in fp64, from ``exp(lse_p)`` as weights."""
    lse = part_lse.double()
    top = lse.amax(0).clamp(min=-1e30)
    weights = (lse - top).exp()
    total = weights.sum(0)
    given = torch.where(weights[..., None] > 0, parts.double(), 0.0)
    with_sink = total if sinks is None else total + (sinks.double().reshape(1, -1, 1) - top).exp()
    out = (given * weights[..., None]).sum(0) / with_sink[..., None]
    if sinks is None:
        out = torch.where((total == 0)[..., None], empty, out)
    return out, top + total.log()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 2, 3, 9))),
    value_dim=st.sampled_from([1, 16, 33]),
    half=st.booleans(),
    sinks=st.booleans(),
    zero=st.booleans(),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_parts(
    run: Run, sizes: tuple[int, ...], value_dim: int, half: bool, sinks: bool, zero: bool, hidden: float, seed: int
) -> None:
    """Parts without a key of a row (minus infinity, and anything as their output) do not count."""
    spec = MergeSpec(FP16 if half else FP32, value_dim, sinks, "zero" if zero else "nan")
    lse = draw(*sizes, seed=seed) * 20
    absent = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < hidden
    lse[absent] = -math.inf
    parts = draw(*sizes, value_dim, seed=seed + 1).to(spec.dtype)
    parts[absent] = math.nan
    named = {"parts": parts, "part_lse": lse, "sinks": draw(sizes[2], seed=seed + 2)}
    out, whole = run(emit_merge(spec), named, config=TILES)
    wanted, wanted_lse = merged(parts, lse, named["sinks"] if sinks else None, 0.0 if zero else math.nan)
    agree(out, wanted, spec.dtype)
    agree(whole, wanted_lse, FP32)


def test_parts_of_the_keys_make_the_whole(run: Run) -> None:
    """The first keys and a window, each with the prefill kernel: their merge sees both."""
    whole = AttentionSpec(FP32, 16, 16, "prefix(4) | band(-6,-1) & ~prefix(4)", lse=True)
    given = operands(whole, 2, 2, 3, 20, 20)
    found = [
        run(emit_prefill(AttentionSpec(FP32, 16, 16, mask, lse=True)), given, config=(16, 16, 4, 1))
        for mask in ("prefix(4)", "band(-6,-1) & ~prefix(4)")
    ]
    parts, lse = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    out, merged_lse = run(emit_merge(MergeSpec(FP32, 16)), {"parts": parts, "part_lse": lse}, config=TILES)
    wanted, wanted_lse = formula(whole, given, [])
    agree(out, wanted, FP32)
    agree(merged_lse, wanted_lse, FP32)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_the_operator(sinks: bool, empty: str) -> None:
    operator = load_kernel(emit_merge(MergeSpec(FP32, 24, sinks, empty))).operator
    parts, lse = draw(3, 2, 4, 5, 24), draw(3, 2, 4, 5, seed=1)
    given = (parts, lse, *([draw(4, seed=2)] if sinks else []))
    torch.library.opcheck(operator, given)
    lse[:, 0, 0, 0] = -math.inf  # only now: opcheck takes no NaN for equal
    wanted = merged(parts, lse, given[2] if sinks else None, 0.0 if empty == "zero" else math.nan)
    agree(operator(*given)[0], wanted[0], FP32)
    agree(operator(*given)[1], wanted[1], FP32)


@pytest.mark.parametrize(
    ("shape", "lse", "message"),
    [
        ((3, 2, 4, 5, 16), (3, 2, 4, 5), "expected value_dim 24"),
        ((3, 2, 4, 5, 24), (3, 2, 4, 6), "the same without value_dim"),
        ((0, 2, 4, 5, 24), (0, 2, 4, 5), "the same without value_dim"),
    ],
)
def test_wrong_operands_are_refused(shape: tuple[int, ...], lse: tuple[int, ...], message: str) -> None:
    operator = load_kernel(emit_merge(MergeSpec(FP32, 24))).operator
    with pytest.raises(ValueError, match=message):
        operator(torch.zeros(shape), torch.zeros(lse))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (MergeSpec(torch.float64, 16), "elements are torch.float64"),
        (MergeSpec(FP32, 1024), "value_dim is 1024"),
        (MergeSpec(FP32, 16, empty_rows="mean"), "empty_rows is 'mean'"),
    ],
)
def test_what_has_no_merge_says_why(spec: MergeSpec, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        emit_merge(spec)
