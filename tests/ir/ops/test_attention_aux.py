"""What attention knows beside its output: log-sum-exp and largest score of rows, column sums, the highest keys. Each is
its formula in fp64 over all scores at once, whatever is masked, shared, capped or empty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.ir import ops
from regraft.ir.mask import parse, to_dense
from regraft.ir.ops import attention_scores
from tests.ir.graphs import numbers

F64 = torch.float64
MASKS = ("all", "band(None,0)", "band(-2,1)", "keys(0) & rows(1)", "dense(2) & band(None,3)", "heads(0,1) | prefix(2)",
         "prefix(0)", "lengths(3)", "same(1,0)")  # fmt: skip


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    """Operands of any size, and what else may change scores."""
    batch, kv_heads, groups = (draw(st.integers(1, most)) for most in (2, 2, 3))
    heads, length, keys = kv_heads * groups, draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 99))
    make = torch.Generator().manual_seed(seed)
    chosen = draw(st.sets(st.sampled_from(("bias", "slopes", "sinks"))))
    rows = draw(st.sampled_from((1, length)))
    return {
        "query": numbers(batch, length, heads, 4, dtype=F64, seed=seed).transpose(1, 2),
        "key": numbers(batch, kv_heads, keys, 4, dtype=F64, seed=seed + 1),
        "mask_tensors": [
            torch.randint(0, 3, (batch, keys), generator=make),
            torch.randint(0, 3, (1, length), generator=make),
            torch.rand((batch, 1, rows, keys), generator=make) > 0.5,
            torch.randint(0, keys + 1, (batch,), generator=make),
        ],
        "bias": numbers(heads, rows, keys, dtype=F64, seed=seed + 2) if "bias" in chosen else None,
        "slopes": numbers(heads, dtype=F64, seed=seed + 3) if "slopes" in chosen else None,
        "sinks": numbers(heads, dtype=F64, seed=seed + 4) if "sinks" in chosen else None,
        "scale": draw(st.sampled_from((0.5, -0.7))),
        "mask": draw(st.sampled_from(MASKS)),
        "mask_fill": draw(st.sampled_from((None, -1.5, -1e30))),
        "softcap": draw(st.sampled_from((0.0, 2.0))),
    }


def scores(site: dict[str, Any], fill: float | None) -> Tensor:
    """All scores of a site, in fp64."""
    query, key = site["query"], site["key"]
    batch, heads, length = query.shape[:3]
    found = query @ key.repeat_interleave(heads // key.shape[1], 1).mT * site["scale"]
    if site["softcap"]:
        found = site["softcap"] * (found / site["softcap"]).tanh()
    found = found if site["bias"] is None else found + site["bias"]
    if site["slopes"] is not None:
        found = found + site["slopes"][:, None, None] * (torch.arange(key.shape[2]) - torch.arange(length)[:, None])
    seen = to_dense(parse(site["mask"]), site["mask_tensors"], batch, heads, length, key.shape[2])
    return found.masked_fill(~seen, -math.inf if fill is None else fill)


def sink_column(site: dict[str, Any], found: Tensor) -> Tensor:
    """Scores with the sinks as a last column."""
    if site["sinks"] is None:
        return found
    return torch.cat([found, site["sinks"].reshape(1, -1, 1, 1).expand(*found.shape[:3], 1)], -1)


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_scores, "_SCORES_AT_ONCE", 40)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(site=sites())
def test_log_sum_exp_and_largest_score(site: dict[str, Any]) -> None:
    found = scores(site, site["mask_fill"])
    torch.testing.assert_close(ops.attention_lse(**site), sink_column(site, found).exp().sum(-1).log())
    without = {name: value for name, value in site.items() if name != "sinks"}
    torch.testing.assert_close(ops.attention_max(**without), found.max(-1).values)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(site=sites(), empty=st.sampled_from(("nan", "zero")))
def test_column_sums_are_those_of_the_softmax(site: dict[str, Any], empty: str) -> None:
    found = scores(site, site["mask_fill"])
    weights = sink_column(site, found).softmax(-1)[..., : found.shape[-1]]
    if empty == "zero" and site["sinks"] is None:
        weights = weights.nan_to_num(0.0)
    torch.testing.assert_close(ops.attention_column_sums(**site, empty_rows=empty), weights.sum(-2), equal_nan=True)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(site=sites(), shared=st.booleans(), data=st.data())
def test_the_highest_keys_of_a_row_or_of_a_group(site: dict[str, Any], shared: bool, data: st.DataObject) -> None:
    given = {name: value for name, value in site.items() if name not in ("sinks", "mask_fill")}
    found = scores(site, None)
    if shared:
        found = found.unflatten(1, (site["key"].shape[1], -1)).amax(2)
    count = data.draw(st.integers(1, found.shape[-1]))
    values, index = ops.attention_topk(**given, count=count, shared=shared)
    torch.testing.assert_close(values, found.sort(-1, descending=True).values[..., :count])
    assert torch.equal(index >= 0, values > -math.inf)
    torch.testing.assert_close(found.gather(-1, index.clamp(min=0))[index >= 0], values[index >= 0])
    places = index.masked_fill(index < 0, found.shape[-1]) + torch.arange(count) * (index < 0)
    assert (places.sort(-1).values.diff() > 0).all()  # no key twice


def test_a_mask_of_some_rows_is_those_rows_of_the_mask() -> None:
    tensors = [torch.tensor([[1, 0, 1, 2]]), torch.tensor([[1, 0, 2]]), torch.rand(2, 1, 3, 4) > 0.5, torch.tensor([2]),
               torch.tensor([[[5], [3], [9]]])]  # fmt: skip
    for text in (*MASKS, "chunk(2,1)", "bits(4)", "~same(1,0)"):
        whole = to_dense(parse(text), tensors, 2, 2, 3, 4)
        assert torch.equal(to_dense(parse(text), tensors, 2, 2, 3, 4, some=slice(1, 3)), whole[:, :, 1:3])


@pytest.mark.parametrize("sizes", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
def test_nothing_to_look_at(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, length, keys = sizes
    query, key = numbers(batch, heads, length, 4), numbers(batch, heads, keys, 4)
    assert torch.equal(ops.attention_lse(query, key, [], scale=1.0), torch.full((batch, heads, length), -math.inf)) or (
        keys and batch * length == 0
    )
    assert ops.attention_max(query, key, [], scale=1.0).shape == (batch, heads, length)
    assert torch.equal(ops.attention_column_sums(query, key, [], scale=1.0), torch.zeros(batch, heads, keys))


def test_more_keys_than_there_are() -> None:
    with pytest.raises(ValueError, match="6 keys were to be selected of 5; give a number from 1 to 5"):
        ops.attention_topk(numbers(1, 1, 2, 4), numbers(1, 1, 5, 4), [], scale=1.0, count=6)
