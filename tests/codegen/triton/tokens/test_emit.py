"""The text of token kernels.

After a deliberate change of the text: ``REGRAFT_GOLDEN=1 pytest tests/codegen/triton/tokens/test_emit.py`` writes it
anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.tokens.merge import MergeSpec, emit_merge_tokens
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.plan_spec import PlanSpec
from regraft.codegen.triton.tokens.samples import token_samples
from tests.codegen.triton.texts import check_text

GOLDEN = Path(__file__).parent / "golden"
ORIGIN = Origin(("reduce tokens",), "plan_merge_1", "model.py:21 in forward")
PLAN = PlanSpec(torch.float16, 64, heads=True)
KERNELS: dict[str, Kernel] = {
    "plan": emit_plan(PLAN, (ORIGIN,)),
    "merge_norm": token_samples()["merge, logs, layer norm float16 768"](),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_text(name: str) -> None:
    check_text(KERNELS[name], GOLDEN / f"{name}.py")


def test_the_head_says_where_a_kernel_comes_from() -> None:
    head = KERNELS["plan"].source.split('"""')[1]
    for fact in (
        "bipartite",
        "metric float16 of width 64, a mean over heads",
        "plan_merge_1",
        "model.py:21 in forward",
    ):
        assert fact in head


def test_a_kernel_is_named_by_what_it_computes_not_by_who_asks() -> None:
    assert emit_plan(PLAN).name == KERNELS["plan"].name != emit_plan(replace(PLAN, causal=True)).name
    spec = MergeSpec(torch.float16, 64)
    names = {emit_merge_tokens(one).kernel.name for one in (spec, replace(spec, sizes=True), replace(spec, logs=True))}
    assert len(names) == 3
