"""``opcheck`` on the operator of every attention, row-wise and token kernel of the catalogue: schema and fake kernel
say what the CPU kernel does. Products and experts have weights of models' sizes there, and tests of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu_operands import Sizes, attention_operands, merge_operands
from bench.gpu_token_operands import merged_operands, plan_operands
from regraft.codegen.triton.attention_layout import CONTIGUOUS
from regraft.codegen.triton.attention_merge import MergeSpec
from regraft.codegen.triton.attention_samples import all_attention
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.samples import all_regions
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.samples import plan_specs, token_samples

_SMALL = {8: 2, 512: 3, 64: 4}  # rows of the catalogue, and of this test


def check(kernel: Kernel, given: dict[str, Any]) -> None:
    """What a second run or a gradient would show is tested family by family: here every text is run once or twice."""
    operator = load_kernel(kernel).operator._opoverload
    operands = tuple(given[name] for name in kernel.operands)
    torch.library.opcheck(operator, operands, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", all_attention())
def test_attention(name: str) -> None:
    sample = all_attention()[name]
    if isinstance(sample.spec, MergeSpec):
        given = merge_operands(sample.spec, "cpu")
        given["parts"] = given["parts"].nan_to_num()  # opcheck takes no NaN for equal
    else:
        sizes = Sizes(2, 4, 3, 5 if sample.layout is None else 3, 20)
        given = attention_operands(sample.spec, sizes, "cpu", sample.layout or CONTIGUOUS)
    check(sample.emit(), given)


@pytest.mark.parametrize("name", all_regions())
def test_regions(name: str) -> None:
    sample, make = all_regions()[name], torch.Generator().manual_seed(0)
    sizes = [(*(_SMALL.get(size, size) for size in held[:-1]), held[-1]) for held in sample.sizes]
    inputs = [torch.randn(size, generator=make).to(sample.kind) for size in sizes]
    kernel = sample.emit()
    check(kernel, dict(zip(kernel.operands, (inputs[place] for place in sample.read()), strict=True)))


@pytest.mark.parametrize("name", token_samples())
def test_tokens(name: str) -> None:
    specs = plan_specs()
    if name in specs:
        check(emit_plan(specs[name]), plan_operands(specs[name], "cpu", 21))
    else:
        kernel = token_samples()[name]()
        check(kernel, merged_operands(load_kernel(kernel), "cpu", 21))
