"""The text of matrix products and of routed experts.

After a deliberate change of the text: ``REGRAFT_GOLDEN=1 pytest tests/codegen/triton/gemm/test_emit.py`` writes it
anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.gemm.emit import emit_product
from regraft.codegen.triton.gemm.experts import emit_experts
from regraft.codegen.triton.gemm.experts_spec import ExpertsSpec
from regraft.codegen.triton.rowwise.samples import written
from regraft.ir import ops
from tests.codegen.triton.texts import check_text

GOLDEN = Path(__file__).parent / "golden"
FP16, FP32 = torch.float16, torch.float32
ORIGIN = Origin(("routed experts",), "moe_1", "model.py:34 in forward")


def _gated_behind_norm(build: Any, x: Any, norm: Any, weight: Any) -> list[fx.Node]:
    both = build.call(torch.ops.aten.linear.default, build.call(ops.rms_norm, x, norm, 1e-6), weight, None)
    return [build.call(ops.glu, build.columns(both, 0, 96), build.columns(both, 96, 192), "silu")]


KERNELS: dict[str, Kernel] = {
    "norm_gate_and_up": emit_product(
        *written(FP16, _gated_behind_norm, ((2, 5, 80), (80,), (192, 80))), (ORIGIN,)
    ).kernel,
    "experts": emit_experts(ExpertsSpec(FP16, FP32, experts=8, hidden=96, intermediate=160), (ORIGIN,)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_text(name: str) -> None:
    check_text(KERNELS[name], GOLDEN / f"{name}.py")


@pytest.mark.parametrize("name", KERNELS)
def test_the_head_says_where_a_kernel_comes_from(name: str) -> None:
    head = KERNELS[name].source.split('"""')[1]
    for fact in ("float16", "moe_1", "model.py:34 in forward", "routed experts"):
        assert fact in head
