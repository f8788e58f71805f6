"""Native plans are those of the definition, index by index; merging and putting back agree with it to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.cpu.native_operators import log_native, merge_native, plan_native, scan_native, unmerge_native
from regraft.ir.ops.linear_scan import reference as scan_reference
from regraft.ir.ops.merge_tokens import reference as merge_reference
from regraft.ir.ops.plan_merge import most_removable
from regraft.ir.ops.plan_merge import reference as plan_reference
from regraft.ir.ops.unmerge_tokens import reference as unmerge_reference
from tests.codegen.cpu.support import needs_native

pytestmark = needs_native
Case = tuple[Tensor, Tensor | None, int, int, int, bool]


@st.composite
def cases(draw: st.DrawFn, matching: str = "bipartite", narrowest: int = 1) -> Case:
    """A metric ``[batch, heads, tokens, width]`` as projections lie in memory, and what to do with it."""
    batch, heads, tokens = (draw(st.integers(1, most)) for most in (3, 3, 270))
    # in a plane, many cosines differ from one by less than is rounded; on a line all are one
    width = draw(st.integers(3, 40) | st.just(1) if narrowest == 1 else st.integers(narrowest, 40))
    prefix = draw(st.integers(0, min(2, tokens)))
    suffix = draw(st.integers(0, min(2, tokens - prefix)))
    remove = draw(st.integers(0, most_removable(tokens, matching, prefix, suffix)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    metric = torch.randn(batch, tokens, heads, width, generator=generator)
    if draw(st.booleans()):  # squares of such numbers leave the range of fp32
        metric *= 10.0 ** torch.randint(-35, 36, (batch, tokens, 1, 1), generator=generator)
    for number in draw(st.sampled_from([(), (0.0,), (float("nan"),), (float("inf"), 0.0)])):
        metric[0, draw(st.integers(0, tokens - 1))] = number
    keep = torch.arange(tokens) < torch.randint(0, tokens + 1, (batch, 1), generator=generator)
    return metric.transpose(1, 2), keep if draw(st.booleans()) else None, remove, prefix, suffix, draw(st.booleans())


@settings(max_examples=120, derandomize=True, deadline=None)
@given(cases())
def test_plans_and_merges_are_those_of_the_definition(case: Case) -> None:
    metric, keep, remove, prefix, suffix, causal = case
    plan = plan_native(metric, keep, remove, prefix, suffix, causal)
    expected = plan_reference(metric.mean(1), None, keep, remove, "bipartite", prefix, suffix, causal, 0.0)
    assert all(torch.equal(own, other) for own, other in zip(plan, expected, strict=True))
    x = torch.randn(metric.shape[0], metric.shape[2], 5)
    sizes = torch.rand(x.shape[:2]) + 1
    for weights in (None, sizes):
        merged, total = merge_native(x, weights, *plan)
        wanted, counted = merge_reference(x, weights, *plan)
        torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(total, counted)
    assert torch.equal(unmerge_native(merged, plan[2]), unmerge_reference(merged, plan[2]))
    torch.testing.assert_close(log_native(total), total.log(), rtol=1e-6, atol=1e-6)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(cases("diverse", 16))
def test_tokens_are_taken_by_turns_as_in_the_definition(case: Case) -> None:
    metric, keep, remove, prefix, suffix, _ = case
    plan = plan_native(metric, keep, remove, prefix, suffix, False, True)
    expected = plan_reference(metric.mean(1), None, keep, remove, "diverse", prefix, suffix, False, 0.0)
    assert all(torch.equal(own, other) for own, other in zip(plan, expected, strict=True))


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 600), st.booleans())
def test_a_recurrence_is_that_of_the_definition(batch: int, steps: int, width: int, shared: bool) -> None:
    generator = torch.Generator().manual_seed(steps)
    decay = torch.rand(steps, batch, 1 if shared else width, generator=generator).transpose(0, 1)
    added = torch.randn(batch, steps + 1, width, generator=generator)[:, 1:]
    start = torch.randn(batch, 2, width, generator=generator)[:, 0]
    wanted = scan_reference(decay.double(), added.double(), start.double())
    torch.testing.assert_close(scan_native(decay, added, start).double(), wanted, rtol=1e-5, atol=1e-5)


def test_equal_tokens_are_matched_by_index() -> None:
    metric = torch.ones(1, 1, 9, 3)
    expected = plan_reference(metric[:, 0], None, None, 3, "bipartite", 1, 0, False, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(plan_native(metric, None, 3, 1, 0, False), expected, strict=True))


def test_equal_tokens_merge_without_a_change() -> None:
    x = torch.randn(2, 6, 37).repeat_interleave(2, dim=1)
    plan = plan_native(x[:, None], None, 6, 0, 0, False)
    merged, sizes = merge_native(x, None, *plan)
    assert torch.equal(unmerge_native(merged, plan[2]), x) and (sizes == 2).all()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_lengths_outside_the_range_of_squares_compare_alike(factor: float) -> None:
    metric = torch.randn(1, 1, 30, 8, generator=torch.Generator().manual_seed(0))
    plan, scaled = (plan_native(values, None, 7, 1, 0, False) for values in (metric, metric * factor))
    assert all(torch.equal(a, b) for a, b in zip(plan, scaled, strict=True))


def test_rows_that_lie_apart_are_read_where_they_are() -> None:
    x = torch.randn(2, 8, 3, 4)[:, :, 1]
    plan = plan_native(x[:, None], None, 3, 0, 0, False)
    torch.testing.assert_close(merge_native(x, None, *plan)[0], merge_reference(x, None, *plan)[0])
    assert torch.equal(unmerge_native(x, plan[2].clamp(max=7)), unmerge_reference(x, plan[2].clamp(max=7)))
