"""The kernels that look at scores alone, interpreted, against formulas in fp64: log-sum-exp and largest score of rows,
column sums, the highest keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.triton.attention_columns import emit_columns
from regraft.codegen.triton.attention_rows import emit_rows
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported
from regraft.codegen.triton.attention_topk import TopkSpec, emit_topk
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.load import load_kernel
from tests.codegen.triton.formula import agree, draw, masked_scores, operands
from tests.codegen.triton.interpreted import Run

TILES = (16, 16, 4, 1)  # small, so that few keys are many tiles
FP32, FP16 = torch.float32, torch.float16
Oracle = Callable[[AttentionSpec, dict[str, Any], list[Tensor]], Tensor]


def lse(spec: AttentionSpec, given: dict[str, Any], masks: list[Tensor]) -> Tensor:
    return with_sinks(spec, given, masked_scores(spec, given, masks)).logsumexp(-1)


def largest(spec: AttentionSpec, given: dict[str, Any], masks: list[Tensor]) -> Tensor:
    return masked_scores(spec, given, masks).amax(-1)


def column_sums(spec: AttentionSpec, given: dict[str, Any], masks: list[Tensor]) -> Tensor:
    scores = masked_scores(spec, given, masks)
    weights = with_sinks(spec, given, scores).softmax(-1)[..., : scores.shape[-1]]
    if spec.empty_rows != "nan" and not spec.sinks:
        filling = 0.0 if spec.empty_rows == "zero" else 1 / scores.shape[-1]
        weights = torch.where(torch.isneginf(scores).all(-1, keepdim=True), filling, weights)
    return weights.sum(-2)


def with_sinks(spec: AttentionSpec, given: dict[str, Any], scores: Tensor) -> Tensor:
    if not spec.sinks:
        return scores
    return torch.cat([scores, given["sinks"].double().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)


KINDS: dict[str, tuple[Callable[[AttentionSpec], Kernel], Oracle]] = {
    "lse": (lambda spec: emit_rows(spec, "lse"), lse),
    "largest": (lambda spec: emit_rows(spec, "largest"), largest),
    "column sums": (emit_columns, column_sums),
}


def compare(run: Run, kind: str, spec: AttentionSpec, given: dict[str, Any], masks: list[Tensor] | None = None) -> None:
    """The kernel on some operands beside the formula."""
    emit, oracle = KINDS[kind]
    named = {**given, **{f"mask_{number}": mask for number, mask in enumerate(masks or [])}}
    agree(run(emit(spec), named, config=TILES), oracle(spec, given, masks or []), spec.dtype)


@pytest.mark.parametrize("mask", ["all", "none", "band(None,0)", "band(-9,4)", "prefix(3) & band(None,0) | band(-6,0)",
                                  "band(None,0) & ~chunk(4)", "band(None,0) & heads(0,1)"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_indices(run: Run, kind: str, mask: str) -> None:
    """Closed forms: intervals, their unions, what differs by head, and what is only a test."""
    spec = AttentionSpec(FP32, 16, 16, mask, empty_rows="zero")
    compare(run, kind, spec, operands(spec, 1, 1, 2, 35, 21))


@pytest.mark.parametrize("mask", ["keys(0) & rows(1)", "lengths(2) & band(-10,None)",
                                  "same(1,0) & band(None,0)", "dense(3) | band(0,0)",
                                  "bits(4) | prefix(key_len - query_len)"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_tensors(run: Run, kind: str, mask: str) -> None:
    """Padding of keys and of queries, lengths, packed documents, any tensor, trees; of each batch, or of all."""
    make = torch.Generator().manual_seed(0)
    masks = [
        torch.randint(0, 3, (2, 21), generator=make),
        torch.randint(0, 3, (2, 19), generator=make),
        torch.tensor([7, 21]),
        torch.rand((2, 1, 19, 21), generator=make) > 0.8,
        torch.randint(-(2**62), 2**62, (2, 19, 1), generator=make),
    ]
    spec = AttentionSpec(FP32, 16, 16, mask, empty_rows="zero")
    ours = masks if kind == "column sums" else [tensor[:1] for tensor in masks]
    compare(run, kind, spec, operands(spec, 2, 1, 2, 19, 21), ours)


@settings(max_examples=7, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 2, 3, 20, 35))),
    dim=st.sampled_from([1, 16, 24, 40]),
    reach=st.integers(-30, 30),
    half=st.booleans(),
    options=st.sets(st.sampled_from(["slopes", "sinks", "softcap"])),
    bias=st.sampled_from(["none", "none", "dense", "keys"]),
    fill=st.sampled_from([None, None, -1.5]),
    empty=st.sampled_from(["nan", "zero", "mean"]),
)
def test_any_size_and_any_combination(
    run: Run, sizes: tuple[int, ...], dim: int, reach: int, half: bool, options: set[str], bias: str,
    fill: float | None, empty: str,
) -> None:  # fmt: skip
    mask = f"band({-reach},{reach + 3})" if reach >= -1 else f"band(None,{reach})"
    flags = {name: True for name in options}
    spec = AttentionSpec(FP16 if half else FP32, dim, 16, mask, fill, empty, bias, **flags)
    given = operands(spec, *sizes)
    for kind in KINDS:
        compare(run, kind, spec, given)


@pytest.mark.parametrize("dim", [80, 320])
@pytest.mark.parametrize("kind", KINDS)
def test_wide_heads(run: Run, kind: str, dim: int) -> None:
    """Widths that are no power of two are padded in registers."""
    for dtype in (FP32, FP16):
        spec = AttentionSpec(dtype, dim, dim, "band(None,0)")
        compare(run, kind, spec, operands(spec, 1, 1, 1, 17, 17))


@pytest.mark.parametrize("kind", KINDS)
def test_operands_that_lie_anywhere(run: Run, kind: str) -> None:
    """Spread over heads without a stride, every second row, and dims that do not lie together."""
    spec = AttentionSpec(FP32, 16, 16, "band(None,0)", empty_rows="zero")
    given = {
        "query": draw(2, 1, 20, 16).expand(2, 4, 20, 16),
        "key": draw(2, 2, 16, 80, seed=1).mT[:, :, 7:73:3],
        "scale": 0.3,
    }
    compare(run, kind, spec, given)


def test_scores_that_no_exponential_holds(run: Run) -> None:
    """exp(3600) is no number, but its logarithm is, and a share of it; NaN stays NaN."""
    spec = AttentionSpec(FP32, 16, 16)
    given = {"query": torch.full((1, 1, 2, 16), 15.0), "key": torch.full((1, 1, 5, 16), 15.0), "scale": 1.0}
    for kind in KINDS:
        compare(run, kind, spec, given)
    given["key"][0, 0, 3, 1] = math.nan
    for kind, (emit, _) in KINDS.items():
        assert bool(run(emit(spec), given, config=TILES).isnan().any()), kind
    given["key"][0, 0, 3, 1] = math.inf
    assert run(emit_rows(spec, "largest"), given, config=TILES).tolist() == [[[math.inf] * 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_look_at(run: Run, kind: str) -> None:
    for sizes in ((0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)):
        batch, heads, length, keys = sizes
        given = {"query": draw(batch, heads, length, 16), "key": draw(batch, heads, keys, 16), "scale": 1.0}
        kernel = KINDS[kind][0](AttentionSpec(FP32, 16, 16))
        found, wanted = run(kernel, given), load_kernel(kernel).operator(*(given[name] for name in kernel.operands))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("dtype", "count", "splits"), [(FP32, 5, 2), (FP16, 20, 1)])
def test_the_highest_keys(run: Run, dtype: torch.dtype, count: int, splits: int, shared: bool) -> None:
    """Some rows see fewer keys than are wanted, some none; heads may choose together; parts of the keys are merged."""
    options = {"softcap": True, "slopes": True, "bias": "dense"}
    spec = AttentionSpec(dtype, 24, 24, "band(None,12) & keys(0)", **options)
    given = operands(spec, 2, 1, 2, 3, 21)
    present = torch.arange(21)[None] < torch.tensor([[19], [0]])
    scores = masked_scores(spec, given, [present])
    if shared:
        scores = scores.unflatten(1, (1, 2)).amax(2)
    kernel = emit_topk(TopkSpec(spec, count, shared))
    values, index = run(kernel, {**given, "mask_0": present}, config=TILES, splits=splits)
    agree(values, scores.sort(-1, descending=True).values[..., :count], dtype)
    assert torch.equal(index >= 0, values > -math.inf)
    agree(values[index >= 0], scores.gather(-1, index.clamp(min=0))[index >= 0], dtype)


def test_of_equal_scores_the_earlier_key_is_taken(run: Run) -> None:
    query, key = torch.zeros(1, 1, 2, 16), draw(1, 1, 20, 16)
    for shared in (False, True):
        kernel = emit_topk(TopkSpec(AttentionSpec(FP32, 16, 16), 4, shared))
        _, index = run(kernel, {"query": query, "key": key, "scale": 1.0}, config=TILES, splits=2)
        assert torch.equal(index, torch.arange(4).expand_as(index))


@pytest.mark.parametrize(
    ("emit", "reason"),
    [
        (lambda: emit_rows(AttentionSpec(torch.float64, 16, 16)), "elements are torch.float64"),
        (lambda: emit_columns(AttentionSpec(FP32, 520, 16)), "head_dim is 520"),
        (lambda: emit_topk(TopkSpec(AttentionSpec(FP32, 16, 16), 65)), "65 keys are selected by torch.float32"),
        (lambda: emit_topk(TopkSpec(AttentionSpec(FP32, 16, 16, mask_fill=-1.0), 4)), "masked scores keep a value"),
    ],
)
def test_what_has_no_kernel_says_why(emit: Callable[[], Kernel], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        emit()


def test_wrong_operands_are_refused() -> None:
    spec = AttentionSpec(FP32, 16, 16)
    operator = load_kernel(emit_columns(spec)).operator
    for query, key, message in (
        (draw(2, 3, 4, 16), draw(2, 2, 4, 16), "heads of queries a multiple of those of keys"),
        (draw(2, 2, 4, 16), draw(2, 0, 4, 16), "heads of queries a multiple of those of keys"),
        (draw(2, 2, 4, 16), draw(1, 2, 4, 16), "expected one batch"),
        (draw(2, 2, 4, 8), draw(2, 2, 4, 16), "expected head_dim 16"),
        (draw(2, 2, 4, 16), draw(2, 2, 4, 16).double(), "expected torch.float32 each"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(query, key, 1.0)
    chosen = load_kernel(emit_topk(TopkSpec(spec, 5))).operator
    with pytest.raises(ValueError, match="5 keys were to be selected of 4"):
        chosen(draw(2, 2, 4, 16), draw(2, 2, 4, 16), 1.0)
