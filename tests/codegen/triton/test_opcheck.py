"""``opcheck`` on the operator of every kernel of the catalogue: schema and fake kernel say what the CPU kernel does. A
family that enters the catalogue needs small operands here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu_operands import Sizes, attention_operands, merge_operands
from bench.gpu_token_operands import merged_operands, plan_operands
from regraft.codegen.triton.attention_layout import CONTIGUOUS
from regraft.codegen.triton.attention_merge import MergeSpec
from regraft.codegen.triton.attention_samples import all_attention
from regraft.codegen.triton.attention_scores_samples import all_scores
from regraft.codegen.triton.catalogue import FAMILIES, samples
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.gemm.experts import emit_experts
from regraft.codegen.triton.gemm.samples import all_experts, all_products
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.samples import RegionSample, all_regions
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.samples import plan_specs, token_samples
from tests.codegen.triton.gemm.test_experts import operands as experts_operands

_ROWS = {8: 2, 512: 3, 64: 4}  # rows of the catalogue, and of this test
_WIDTHS = {4096: 32, 28672: 64, 6144: 48, 3072: 24, 768: 16}  # of weights
_MOST_KEYS = 300  # more than a kernel of the catalogue keeps

Case = tuple[Kernel, dict[str, Any]]


def attention(name: str) -> Case:
    sample = all_attention()[name]
    if isinstance(sample.spec, MergeSpec):
        given = merge_operands(sample.spec, "cpu")
        given["parts"] = given["parts"].nan_to_num()  # opcheck takes no NaN for equal
    else:
        sizes = Sizes(2, 4, 3, 5 if sample.layout is None else 3, 20)
        given = attention_operands(sample.spec, sizes, "cpu", sample.layout or CONTIGUOUS)
    return sample.emit(), given


def scores(name: str) -> Case:
    sample = all_scores()[name]
    return sample.emit(), attention_operands(sample.spec, Sizes(2, 4, 3, 5, 5 if sample.square else _MOST_KEYS), "cpu")


def region(sample: RegionSample) -> Case:
    make, kernel = torch.Generator().manual_seed(0), sample.emit()
    inputs = [torch.randn(size, generator=make).to(sample.kind) for size in sample.sizes]
    return kernel, dict(zip(kernel.operands, (inputs[place] for place in sample.read()), strict=True))


def rows(name: str) -> Case:
    sample = all_regions()[name]
    small = tuple((*(_ROWS.get(size, size) for size in held[:-1]), held[-1]) for held in sample.sizes)
    kernel, given = sample.emit(), region(replace(sample, sizes=small))[1]
    return kernel, dict(zip(kernel.operands, given.values(), strict=True))


def product(name: str) -> Case:
    """A layer of the same text in small: sizes of weights are part of it."""
    sample = all_products()[name]
    small = tuple(tuple((_ROWS | _WIDTHS)[size] for size in held) for held in sample.sizes)
    return region(replace(sample, sizes=small))


def experts(name: str) -> Case:
    spec = replace(all_experts()[name], experts=3, hidden=16, intermediate=24)
    return emit_experts(spec), experts_operands(spec, 5, 2)


def tokens(name: str) -> Case:
    specs = plan_specs()
    if name in specs:
        return emit_plan(specs[name]), plan_operands(specs[name], "cpu", 21)
    kernel = token_samples()[name]()
    return kernel, merged_operands(load_kernel(kernel), "cpu", 21)


CASES: dict[str, Callable[[str], Case]] = {
    "attention": attention,
    "scores": scores,
    "rowwise": rows,
    "product": product,
    "experts": experts,
    "tokens": tokens,
}


def test_every_family_has_operands() -> None:
    assert CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("family", "name"), [pytest.param(s.family, s.name, id=f"{s.family} {s.name}") for s in samples()]
)
def test_schema_and_fake_kernel(family: str, name: str) -> None:
    """What a second run or a gradient would show is tested family by family: here every text is run once or twice."""
    kernel, given = CASES[family](name)
    operands = tuple(given[operand] for operand in kernel.operands)
    operator = load_kernel(kernel).operator._opoverload
    torch.library.opcheck(operator, operands, test_utils=("test_schema", "test_faketensor"))
