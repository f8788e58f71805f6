"""The native attention kernel against its formula in fp64, over sizes that are no multiple of anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.cpu.native import attention
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import attend_native
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native

pytestmark = needs_native


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 0.3,
    softcap: float = 0.0,
) -> Tensor:
    """In fp64; rows without a key are zero."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if mask is None else scores + mask.double()
    if slopes is not None:
        places = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
        scores = scores + slopes.double()[:, None, None] * places
    scores = scores.masked_fill(~allowed, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]].nan_to_num(0.0) @ value


def run(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor | None, **options: Any) -> Tensor:
    tables = [options.pop(name, None) for name in ("mask", "slopes", "sinks")]
    scale, softcap = options.pop("scale", 0.3), options.pop("softcap", 0.0)
    return attend_native(
        query,
        key,
        value,
        *tables,
        scale,
        softcap,
        intervals,
        options.pop("bits", None),
        options.pop("empty_rows", "zero"),
    )


def visible(intervals: Tensor, keys: int) -> Tensor:
    """Spans as a dense mask ``[batch or 1, heads or 1, length, keys]``."""
    places = torch.arange(keys)
    return ((places >= intervals[0, ..., None]) & (places < intervals[1, ..., None])).any(-2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 120),
    keys=st.integers(1, 150),
    head_dim=st.integers(1, 80),
    value_dim=st.integers(1, 80),
    reach=st.integers(-40, 160),
    options=st.sets(
        st.sampled_from(["mask", "row mask", "slopes", "sinks", "softcap", "intervals", "per batch", "per head", "two"])
    ),
)
def test_any_size_and_any_combination(
    batch: int, kv_heads: int, groups: int, length: int, keys: int, head_dim: int, value_dim: int, reach: int,
    options: set[str],
) -> None:  # fmt: skip
    heads = kv_heads * groups
    query = draw(batch, length, heads, head_dim).transpose(1, 2)
    key = draw(batch, kv_heads, keys, head_dim, seed=1)
    value = draw(batch, keys, kv_heads, value_dim, seed=2).transpose(1, 2)
    named: dict[str, Any] = {}
    if "mask" in options:
        named["mask"] = draw(1, heads, length, keys, seed=3)
    elif "row mask" in options:
        named["mask"] = torch.where(draw(batch, 1, 1, keys, seed=4) > 1, -math.inf, 0.0)
    if "slopes" in options:
        named["slopes"] = draw(heads, seed=5)
    if "sinks" in options:
        named["sinks"] = draw(heads, seed=6)
    if "softcap" in options:
        named["softcap"] = 1.5
    intervals = None
    allowed = torch.ones(1, 1, length, keys, dtype=torch.bool)
    if "intervals" in options:
        rows = torch.arange(length).reshape(1, 1, -1)
        rows = rows + 7 * torch.arange(batch if "per batch" in options else 1).reshape(-1, 1, 1)
        rows = rows + 3 * torch.arange(heads if "per head" in options else 1).reshape(-1, 1)
        start = (rows - reach).clamp(0, keys)
        end = torch.maximum(start, (rows + reach + 1).clamp(0, keys))
        intervals = torch.stack((start, end))[..., None].contiguous()
        if "two" in options:  # a few keys at the start too, as far as they are not seen already
            few = torch.stack((torch.zeros_like(start), torch.minimum(start, torch.tensor(5))))[..., None]
            intervals = torch.cat((few, intervals), -1).contiguous()
        allowed = visible(intervals, keys)
    wanted = formula(query, key, value, allowed, **named)
    given_ = run(query, key, value, intervals, **named)
    assert given_.shape == wanted.shape
    assert relative_l2(given_.double(), wanted) <= 2e-6


@pytest.mark.parametrize("window", [1, 100, 700, 2000])
def test_many_blocks_of_keys(window: int) -> None:
    """Longer than the kernel's block: weights are rescaled as a higher maximum is met."""
    length = 1500
    query, key, value = draw(1, 2, length, 24) * 3, draw(1, 1, length, 24, seed=1) * 3, draw(1, 1, length, 40, seed=2)
    rows = torch.arange(length)[None]
    intervals = torch.stack(((rows - window + 1).clamp(min=0), rows + 1))[:, :, None, :, None]
    wanted = formula(query, key, value, visible(intervals, length))
    assert relative_l2(run(query, key, value, intervals).double(), wanted) <= 2e-6


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as a test asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 8], indirect=True)
def test_keys_are_packed_by_each_task_where_there_are_heads_for_all_threads_else_once(threads: int) -> None:
    batch, heads, kv_heads, length, keys = 2, 6, 3, 70, 131
    query, key = draw(batch, heads, length, 20), draw(batch, kv_heads, keys, 20, seed=1)
    value = draw(batch, kv_heads, keys, 24, seed=2)
    packed = NATIVE.library().regraft_attention_workspace(batch, heads, kv_heads, length, keys, 20, 24)
    assert (packed == 0) == (threads == 1)
    wanted = formula(query, key, value, torch.ones(1, 1, length, keys, dtype=torch.bool))
    assert relative_l2(run(query, key, value, None).double(), wanted) <= 2e-6


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("sizes", [(64, 64), (20, 40), (36, 21)])
@pytest.mark.parametrize("keys", [1030, 2500])
def test_few_queries_over_many_keys(length: int, groups: int, sizes: tuple[int, int], keys: int) -> None:
    """Heads that share keys are rows of one block, and parts of the keys are summed up apart."""
    query = draw(1, length, 2 * groups, sizes[0]).transpose(1, 2) * 2
    key, value = draw(1, keys, 2, sizes[0], seed=1).transpose(1, 2), draw(1, 2, keys, sizes[1], seed=2)
    sinks, mask = draw(2 * groups, seed=3), draw(1, 2 * groups, length, keys, seed=4)
    everything = torch.ones(1, 1, length, keys, dtype=torch.bool)
    for options in ({}, {"sinks": sinks}, {"mask": mask, "softcap": 5.0}, {"slopes": sinks / 100}):
        wanted = formula(query, key, value, everything, **options)
        assert relative_l2(run(query, key, value, None, **options).double(), wanted) <= 2e-6


@pytest.mark.parametrize("window", [1, 40, 900])
def test_few_queries_see_spans_that_lie_in_some_parts_of_the_keys(window: int) -> None:
    """Each head another place, the first head nothing at all."""
    heads, keys = 4, 3000
    query, key, value = draw(1, heads, 1, 16), draw(1, 2, keys, 16, seed=1), draw(1, 2, keys, 16, seed=2)
    start = torch.tensor([0, 500, 1000, 2100]).reshape(1, heads, 1)
    intervals = torch.stack((start, start + window * (start > 0)))[..., None]
    wanted = formula(query, key, value, visible(intervals, keys))
    assert relative_l2(run(query, key, value, intervals).double(), wanted) <= 2e-6


@pytest.mark.parametrize(("name", "value"), [("zero", 0.0), ("nan", math.nan), ("mean", None)])
def test_rows_without_keys(name: str, value: float | None) -> None:
    query, key, values = (draw(2, 2, 5, 8, seed=seed) for seed in range(3))
    padding = torch.zeros(2, 1, 1, 5)
    padding[1] = -math.inf
    result = run(query, key, values, None, mask=padding, empty_rows=name)
    expected = values[1].mean(-2, keepdim=True).expand(2, 5, 8) if value is None else torch.full((2, 5, 8), value)
    torch.testing.assert_close(result[1], expected, equal_nan=True)
    assert bool(torch.isfinite(result[0]).all())


def test_a_row_that_is_masked_with_the_lowest_number_sees_all_keys_alike() -> None:
    """Also in a later block of keys, where weights are rescaled, and beside rows that are not masked."""
    lowest = torch.finfo(torch.float32).min
    query, key, value = draw(1, 1, 3, 8), draw(1, 1, 700, 8, seed=1), draw(1, 1, 700, 8, seed=2)
    mask = torch.zeros(1, 1, 3, 700)
    mask[..., 1, :] = lowest
    mask[..., 2, :600] = lowest
    wanted = formula(query, key, value, torch.ones(1, 1, 3, 700, dtype=torch.bool), mask)
    wanted[..., 1, :] = value.double().mean(-2)  # adding the lowest number in fp32 is writing it
    assert relative_l2(run(query, key, value, None, mask=mask).double(), wanted) <= 2e-6


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(("length", "keys"), [(70, 70), (4, 1100)])
def test_what_is_not_a_number_is_not_hidden(where: str, number: float, length: int, keys: int) -> None:
    operands = {
        "query": draw(1, 1, length, 8),
        "key": draw(1, 1, keys, 8, seed=1),
        "value": draw(1, 1, keys, 8, seed=2),
    }
    operands[where][0, 0, 3, 2] = number
    result = run(*operands.values(), None)
    wanted = (operands["query"] @ operands["key"].mT * 0.3).softmax(-1) @ operands["value"]
    assert torch.equal(torch.isnan(result), torch.isnan(wanted))


def test_scores_too_large_for_an_exponential() -> None:
    query, key, value = draw(1, 1, 4, 8) * 1e4, draw(1, 1, 9, 8, seed=1) * 1e4, draw(1, 1, 9, 8, seed=2)
    everything = torch.ones(1, 1, 4, 9, dtype=torch.bool)
    assert relative_l2(run(query, key, value, None).double(), formula(query, key, value, everything)) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    query, key = torch.empty(shape), torch.empty(shape[0], 2, 5, 4)
    assert run(query, key, key, None).shape == shape


def test_no_keys_at_all() -> None:
    query, key = draw(1, 1, 3, 4), torch.empty(1, 1, 0, 4)
    assert torch.equal(run(query, key, key, None), torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("layout", ["columns apart", "one head for all", "reversed strides"])
def test_any_strides(layout: str) -> None:
    query, key, value = (draw(2, 4, 10, 8, seed=seed) for seed in range(3))
    if layout == "columns apart":
        query, key, value = (draw(2, 4, 10, 16, seed=seed)[..., ::2] for seed in range(3))
    elif layout == "one head for all":
        key, value = (draw(2, 1, 10, 8, seed=seed).expand(2, 4, 10, 8) for seed in (1, 2))
    else:
        query, key, value = (draw(8, 10, 4, 2, seed=seed).permute(3, 2, 1, 0) for seed in range(3))
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    assert relative_l2(run(query, key, value, None).double(), formula(query, key, value, everything)) <= 1e-6


def test_the_sample_is_of_fp32_whatever_the_default_is() -> None:
    """A checkpoint in bf16 is loaded under that default, in another thread than the one that opens the library."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert not attention.check(NATIVE.library())
    finally:
        torch.set_default_dtype(torch.float32)
