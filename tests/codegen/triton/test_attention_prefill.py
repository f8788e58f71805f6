"""The prefill kernel, interpreted, against the formula in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import NORMALISERS, WEIGHTS, AttentionSpec
from tests.codegen.triton.formula import agree, draw, formula, operands
from tests.codegen.triton.interpreted import Run

TILES = (16, 16, 4, 1)  # small, so that few keys are many tiles
FP32, FP16 = torch.float32, torch.float16
LOWEST = torch.finfo(FP32).min


def compare(run: Run, spec: AttentionSpec, given: dict[str, Any], masks: list[Tensor] | None = None) -> None:
    """The kernel on some operands beside the formula."""
    masks = masks or []
    result = run(emit_prefill(spec), {**given, **{f"mask_{n}": mask for n, mask in enumerate(masks)}}, config=TILES)
    wanted, lse = formula(spec, given, masks)
    agree(result[0] if spec.lse else result, wanted, spec.dtype)
    if spec.lse:
        agree(result[1], lse, FP32)


MASKS = [
    "all",
    "none",
    "band(None,0)",
    "band(None,key_len - query_len)",
    "band(-9,0)",
    "band(-9,4)",
    "prefix(5)",
    "prefix(5) | band(None,0)",
    "prefix(3) & band(None,0) | band(-6,0)",
    "chunk(8)",
    "chunk(8,-3) | prefix(2)",
    "band(None,0) & (heads(0,1) | band(-5,None))",
    "~prefix(30) | prefix(4) | band(-2,2)",
    "~prefix(30) | prefix(4) | band(-2,2) | chunk(4)",
    "band(None,0) & ~chunk(4)",
]


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_indices(run: Run, mask: str, dtype: torch.dtype) -> None:
    """Closed forms: intervals, their unions, what differs by head, and what is only a test."""
    spec = AttentionSpec(dtype, 16, 16, mask, empty_rows="zero", lse=True)
    compare(run, spec, operands(spec, 1, 1, 2, 37, 41))


@pytest.mark.parametrize("mask", ["keys(0)", "band(None,0) & keys(0)", "rows(1) & band(-9,9)", "~keys(0) | prefix(3)",
                                  "lengths(2)", "~lengths(2) & band(-30,None)", "same(1,0)", "same(1,0) & band(None,0)",
                                  "dense(3) | band(0,0)", "bits(4) | prefix(key_len - query_len)"])  # fmt: skip
def test_masks_of_tensors(run: Run, mask: str) -> None:
    """Padding of keys and of queries, lengths, packed documents, any tensor, trees; of each batch, or of all."""
    make = torch.Generator().manual_seed(0)
    masks = [
        torch.randint(0, 3, (2, 41), generator=make),
        torch.randint(0, 3, (2, 37), generator=make),
        torch.tensor([17, 41]),
        torch.rand((2, 1, 37, 41), generator=make) > 0.8,
        torch.randint(-(2**62), 2**62, (2, 37, 1), generator=make),
    ]
    spec = AttentionSpec(FP32, 16, 16, mask, empty_rows="zero")
    given = operands(spec, 2, 1, 2, 37, 41)
    compare(run, spec, given, masks)
    compare(run, spec, given, [tensor[:1] for tensor in masks])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 2, 3, 40, 50))),
    dims=st.tuples(st.sampled_from([1, 16, 24, 40]), st.sampled_from([8, 16, 33])),
    reach=st.integers(-30, 30),
    half=st.booleans(),
    options=st.sets(st.sampled_from(["slopes", "sinks", "softcap", "lse"])),
    bias=st.sampled_from(["none", "none", "dense", "keys"]),
)
def test_any_size_and_any_combination(
    run: Run, sizes: tuple[int, ...], dims: tuple[int, int], reach: int, half: bool, options: set[str], bias: str
) -> None:
    mask = f"band({-reach},{reach + 3})" if reach >= -1 else "all"
    flags = {name: True for name in options}
    spec = AttentionSpec(FP16 if half else FP32, *dims, mask, empty_rows="zero", bias=bias, **flags)
    compare(run, spec, operands(spec, *sizes))


@pytest.mark.parametrize("dim", [80, 128, 192, 256, 512])
def test_wide_heads(run: Run, dim: int) -> None:
    """Widths that are no power of two are padded in registers."""
    spec = AttentionSpec(FP32, dim, 16, "band(None,0)")
    compare(run, spec, operands(spec, 1, 1, 1, 17, 17))
    spec = AttentionSpec(FP16, 16, dim, "band(None,0)")
    compare(run, spec, operands(spec, 1, 1, 1, 17, 17))


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_and_normalisers(run: Run, weight: str, normaliser: str, dtype: torch.dtype) -> None:
    """The mask is 0/1; where weights cancel, the sum is no normaliser."""
    spec = AttentionSpec(dtype, 16, 16, "band(-9,0)", weight=weight, normaliser=normaliser, constant=0.5)
    if weight in ("relu", "gelu", "identity") and normaliser.startswith("sum") and normaliser != "sum_abs":
        spec = replace(spec, softcap=True, bias="dense")  # scores above 2: their sums are far from 0
    given = operands(spec, 1, 1, 2, 20, 20)
    if spec.bias != "none":
        given["bias"] = given["bias"].abs() + 2.5
    compare(run, spec, given)


@pytest.mark.parametrize(("normaliser", "constant"), [("constant", 1e6), ("sum_eps", 1e-8), ("sum_abs", 1.0)])
def test_exponentials_beyond_half_precision(run: Run, normaliser: str, constant: float) -> None:
    """exp(14) is no number of fp16, though what is made of it is; a row without keys is zero."""
    mask = "band(-9,-1)"
    spec = AttentionSpec(FP16, 16, 16, mask, weight="exp", normaliser=normaliser, constant=constant, softcap=True)
    given = operands(spec, 1, 1, 2, 20, 20) | {"softcap": 14.0, "scale": 6.0}
    assert float(formula(replace(spec, normaliser="none"), given, [])[0].abs().max()) > 65504
    compare(run, spec, given)


@pytest.mark.parametrize("empty", ["nan", "zero", "mean"])
def test_rows_without_keys(run: Run, empty: str) -> None:
    """NaN as of a softmax of nothing, zero as PyTorch's attention gives, the mean where a number stood everywhere."""
    padding = torch.ones(2, 20)
    padding[1] = 0
    for mask in ("keys(0)", "keys(0) & band(-3,-1)"):
        spec = AttentionSpec(FP32, 16, 16, mask, empty_rows=empty, lse=True)
        compare(run, spec, operands(spec, 2, 1, 1, 20, 20), [padding])


@pytest.mark.parametrize("fill", [-1.0, -1e4, LOWEST])
def test_a_number_at_masked_scores_takes_its_weight(run: Run, fill: float) -> None:
    """Beside a bias that hides keys with the lowest number too, as the sum of two masks does."""
    spec = AttentionSpec(FP32, 16, 16, "band(-4,-1)", mask_fill=fill, bias="dense")
    given = operands(spec, 1, 1, 2, 20, 20)
    given["bias"][..., 3:] = LOWEST
    compare(run, spec, given)


def test_a_bias_of_minus_infinity_hides_keys(run: Run) -> None:
    spec = AttentionSpec(FP32, 16, 16, "band(None,0)", empty_rows="zero", bias="dense", lse=True)
    given = operands(spec, 1, 1, 2, 20, 20)
    given["bias"][..., :9] = -math.inf
    compare(run, spec, given)


def test_scores_too_large_for_an_exponential(run: Run) -> None:
    spec = AttentionSpec(FP32, 16, 16)
    given = operands(spec, 1, 1, 1, 4, 20)
    given["query"], given["key"] = given["query"] * 1e4, given["key"] * 1e4
    compare(run, spec, given)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_a_number_is_not_hidden(run: Run, where: str) -> None:
    spec = AttentionSpec(FP32, 16, 16)
    given = operands(spec, 1, 1, 1, 20, 20)
    given[where] = given[where].clone()
    given[where][0, 0, 3, 2] = math.nan
    compare(run, spec, given)


@pytest.mark.parametrize("layout", ["columns apart", "one head for all", "reversed"])
def test_any_strides(run: Run, layout: str) -> None:
    spec = AttentionSpec(FP32, 16, 16, "band(None,0)")
    given = operands(spec, 2, 4, 1, 20, 20)
    for seed, name in enumerate(("query", "key", "value")):
        if layout == "columns apart":
            given[name] = draw(2, 4, 20, 32, seed=seed)[..., ::2]
        elif layout == "one head for all":
            given[name] = draw(2, 1, 20, 16, seed=seed).expand(2, 4, 20, 16)
        else:
            given[name] = draw(16, 20, 4, 2, seed=seed).permute(3, 2, 1, 0)
    compare(run, spec, given)


@pytest.mark.parametrize(("sizes", "keys"), [((0, 1, 1, 4), 5), ((2, 1, 2, 0), 5), ((1, 1, 1, 3), 0)])
def test_nothing_to_do(run: Run, sizes: tuple[int, ...], keys: int) -> None:
    spec = AttentionSpec(FP32, 16, 16, lse=True)
    given = operands(spec, *sizes, keys)
    out, lse = run(emit_prefill(spec), given)
    assert out.shape == given["query"].shape and not out.any()
    assert bool(torch.isneginf(lse).all())
