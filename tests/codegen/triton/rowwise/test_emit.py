"""The text of row-wise kernels, and the operator that each file registers.

After a deliberate change of the text: ``REGRAFT_GOLDEN=1 pytest tests/codegen/triton/rowwise/test_emit.py`` writes it
anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.triton.build import build
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.emit import emit_region
from regraft.ir import ops
from tests.codegen.triton.rowwise.support import region_of
from tests.codegen.triton.texts import check_text
from tests.support import captured

GOLDEN = Path(__file__).parent / "golden"
HALF = torch.float16


def _residual_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    normed, total = ops.add_norm(x, residual, weight, None, 1e-6, "rms_norm", 0.0, "before_weight")
    return normed, total


def _qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.rope(ops.rms_norm(x, weight, 1e-6).transpose(1, 2), cos, sin, 96)


KERNELS: dict[str, Kernel] = {
    "residual_rms_norm": region_of(
        _residual_norm, *(torch.zeros(*s, dtype=HALF) for s in ((2, 3, 768),) * 2 + ((768,),))
    ).kernel,
    "qk_norm_rope": region_of(
        _qk_norm_rope,
        *(torch.zeros(*size, dtype=torch.bfloat16) for size in ((2, 5, 3, 128), (128,), (5, 96), (5, 96))),
    ).kernel,
    "long_softmax": region_of(lambda x: torch.softmax(x * 0.125, -1), torch.zeros(3, 20000)).kernel,
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_text(name: str) -> None:
    check_text(KERNELS[name], GOLDEN / f"{name}.py")


def test_the_head_says_where_a_kernel_comes_from() -> None:
    from regraft.codegen.triton.emit import Origin

    program = captured(lambda x: torch.relu(x + 1), (torch.zeros(2, 8),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    origins = tuple(Origin.of(node) for node in calls)
    head = emit_region(calls, calls[-1:], program.fake_mode, origins).kernel.source.split('"""')[1]
    for fact in ("x float32 [row, 8]", "out float32 [row, 8]", "relu", "test_emit.py"):
        assert fact in head


def operands(kernel: Kernel) -> tuple[Any, ...]:
    """Random tensors that a golden kernel takes."""
    sizes = {
        "residual_rms_norm": ((2, 3, 768), (2, 3, 768), (768,)),
        "qk_norm_rope": ((2, 5, 3, 128), (128,), (5, 96), (5, 96)),
        "long_softmax": ((3, 20000),),
    }[next(name for name, held in KERNELS.items() if held is kernel)]
    kind = HALF if "float16)" in kernel.source and "bfloat16" not in kernel.source else torch.float32
    kind = torch.bfloat16 if "bfloat16" in kernel.source else kind
    return tuple(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(kind) for size in sizes)


@pytest.mark.parametrize("name", KERNELS)
def test_the_operator(name: str) -> None:
    """Fake, schema and CPU kernel agree with each other; results lie in memory as the graph had them."""
    kernel = KERNELS[name]
    operator = load_kernel(kernel).operator
    given = operands(kernel)
    torch.library.opcheck(operator._opoverload, given)
    if name == "qk_norm_rope":
        wanted = _qk_norm_rope(*given)
        torch.testing.assert_close(operator(*given), wanted, rtol=2e-2, atol=2e-2)
        assert operator(*given).stride() == wanted.stride()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((torch.zeros(2, 8),), "expected 3 dims"),
        ((torch.zeros(2, 3, 9),), r"emitted for torch.float32 \(2, 3, 8\)"),
        ((torch.zeros(2, 3, 8, dtype=HALF),), "x is torch.float16"),
        ((torch.zeros(2, 3, 8), torch.zeros(4)), r"emitted for torch.float32 \(8,\)"),
    ],
)
def test_a_wrong_operand_is_refused(change: tuple[Tensor, ...], message: str) -> None:
    region = region_of(lambda x, w: torch.relu(x) * w, torch.zeros(2, 3, 8), torch.zeros(8))
    with pytest.raises(ValueError, match=message):
        load_kernel(region.kernel).launch(*change, *((torch.zeros(8),) if len(change) == 1 else ()))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["qk_norm_rope", "long_softmax"])
def test_it_builds_without_spills(name: str, arch: str) -> None:
    made = build(KERNELS[name], KERNELS[name].entries[0], arch)
    assert made.resources.spilled == 0 and made.resources.registers > 0
