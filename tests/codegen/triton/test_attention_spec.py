"""What a site asks of a kernel, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regraft.codegen.triton.attention_layout import KeyLayout
from regraft.codegen.triton.attention_parts import AttentionParts
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported, site_spec, supports
from regraft.ir import ops
from regraft.ir.capture import capture
from regraft.ir.nodes import arguments

FP32, FP16 = torch.float32, torch.float16


class Site(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {"scale": 0.25, **options}

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *masks: torch.Tensor) -> Any:
        return ops.attention(query, key, value, list(masks), **self.options)


def spec_of(*masks: torch.Tensor, dtype: torch.dtype = FP16, head_dim: int = 16, **options: Any) -> AttentionSpec:
    query, key, value = (torch.randn(2, 4, 8, head_dim).to(dtype) for _ in range(3))
    program = capture(Site(**options), (query, key, value, *masks))
    (site,) = (arguments(node) for node in program.graph.nodes if node.target is ops.attention)
    return site_spec(site)


def test_a_site_says_all_that_a_kernel_depends_on() -> None:
    spec = spec_of(mask="band(None,0)", softcap=30.0, slopes=torch.ones(4), sinks=torch.ones(4), bias=torch.ones(8))
    assert spec == AttentionSpec(
        FP16, 16, 16, "band(None,0)", empty_rows="nan", bias="keys", slopes=True, sinks=True, softcap=True
    )
    assert spec_of(bias=torch.ones(2, 1, 8, 8)).bias == "dense"


def test_a_bias_may_empty_rows_that_the_mask_does_not() -> None:
    assert spec_of(mask="band(None,0)").empty_rows == "zero"  # no row is empty: the cheapest will do
    assert spec_of(mask="band(None,0)", bias=torch.zeros(8, 8)).empty_rows == "nan"


def test_a_number_that_leaves_no_weight_removes_keys_and_gives_empty_rows_the_mean() -> None:
    lowest = torch.finfo(FP16).min
    assert spec_of(torch.ones(2, 8), mask="keys(0)", mask_fill=lowest).empty_rows == "mean"
    assert spec_of(torch.ones(2, 8), mask="keys(0)", mask_fill=lowest).mask_fill is None
    assert spec_of(torch.ones(2, 8), mask="keys(0)", mask_fill=-5.0).mask_fill == -5.0
    beside_bias = spec_of(torch.ones(2, 8), mask="keys(0)", mask_fill=lowest, bias=torch.ones(8, 8))
    assert beside_bias.mask_fill == lowest


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "elements are torch.float64"),
        ({"head_dim": 520}, "head_dim is 520"),
        ({"scale": -1.0}, "scale is -1.0"),
    ],
)
def test_a_site_without_a_kernel_says_why(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        spec_of(**options)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (AttentionSpec(FP32, 16, 16, "prefix(other)"), "has bounds in other"),
        (AttentionSpec(FP32, 16, 16, "keys(0) & dense(0)"), "read as keys and as pairs"),
        (AttentionSpec(FP32, 16, 16, weight="softmax"), "weight is 'softmax'"),
        (AttentionSpec(FP32, 16, 16, weight="relu", normaliser="none", sinks=True), "have no sink"),
        (AttentionSpec(FP32, 16, 16, weight="relu", normaliser="none", lse=True), "have no log-sum-exp"),
        (AttentionSpec(FP32, 16, 16, "band(None,0)", mask_fill=0.0, weight="relu", normaliser="none"), "is 0/1"),
        (AttentionSpec(FP32, 16, 16, weight="relu", normaliser="constant", constant=0.0), "divide by it"),
    ],
)
def test_a_spec_without_a_kernel_says_why(spec: AttentionSpec, reason: str) -> None:
    assert reason in (supports(spec) or "")


@pytest.mark.parametrize(
    ("spec", "layout", "reason"),
    [
        (AttentionSpec(FP32, 16, 16, "keys(0)", empty_rows="mean"), KeyLayout(packs_heads=True), "would average"),
        (AttentionSpec(FP32, 16, 16, "keys(0)"), KeyLayout("paged", 16, packs_heads=True), "reads a tensor of keys"),
        (AttentionSpec(FP32, 16, 16, bias="dense"), KeyLayout("paged", 16, packs_heads=True), "have no bias"),
    ],
)
def test_a_layout_without_a_kernel_says_why(spec: AttentionSpec, layout: KeyLayout, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        AttentionParts(spec, layout)


def test_a_layout_is_checked() -> None:
    with pytest.raises(ValueError, match="'strided'"):
        KeyLayout("strided")
    with pytest.raises(ValueError, match="a page of 0 keys"):
        KeyLayout("paged")
