"""Chains of calls on rows run as one program on the CPU: which do, what they give, in which order the rest follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from regraft.codegen.cpu import regions
from regraft.codegen.cpu.lower import lower
from regraft.ir.capture import capture
from regraft.ir.program import Program
from tests.codegen.cpu.support import needs_native
from tests.codegen.rowwise.support import agree
from tests.strategies import canonical_programs
from tests.support import AsModule, captured

pytestmark = needs_native


def calls(program: Program) -> list[str]:
    """What the lowered graph calls, by name."""
    module = lower(program).module
    return [getattr(n.target, "__name__", str(n.target)) for n in module.graph.nodes if n.op == "call_function"]


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


X, Y = draw(3, 40, 24), draw(3, 40, 24, seed=1)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a chain": (lambda x, y: ((x * y + 1).exp() - x.abs().sqrt()) / (y.tanh() + 2), (X, Y)),
    "a row beside all": (lambda x, y: (x * y + 3).relu() * x - y, (X, draw(24))),
    "sums and means of rows": (
        lambda x, y: (x - x.mean(-1, keepdim=True)) * y + x.sum(-1, keepdim=True),
        (X, draw(40, 1)),
    ),
    "rows shorter than a vector": (lambda x, y: (x * 0.3).softmax(-1) * y, (draw(30, 50, 9), draw(9))),
    "rows longer than a block": (lambda x, y: (x * y).softmax(-1) * x, (draw(5, 3000), draw(5, 3000, seed=1))),
    "dims in another order": (lambda x, y: F.gelu(x.transpose(1, 2) * 2 + y), (draw(3, 5, 7, 16), draw(3, 7, 5, 16))),
    "columns and rows turned": (lambda x, y: F.silu(x.mT * 2 + y), (draw(3, 24, 40), X)),
    "pieces of columns": (lambda x, y: torch.cat((x[..., :8] * 2, y[..., 8:] + 1), -1) * 3, (X, Y)),
    "halves of wide rows": (  # a column count is no register, however wide
        lambda x: (x[:, 6000:].clamp(-1, 1) + 1) * x[:, :6000].clamp(max=1).sigmoid(),
        (draw(39, 12000),),
    ),
    "a mask": (lambda x, m: torch.where(m[..., None], x * 2, x.neg()), (X, draw(3, 40) > 0)),
    "truth values": (lambda x, y: (((x > 0) & (y <= 0.5)) | ~(x > y), torch.where(x > y, x, y) * 2), (X, Y)),
    "activations": (
        lambda x, y: F.softplus(x) + F.elu(y) + F.leaky_relu(x - y, 0.1) + x.clamp(-1, 1) ** 3 + F.hardtanh(y),
        (X, Y),
    ),
    "logarithms": (lambda x, y: F.log_softmax(x * y, -1) + (x.abs() + 0.1).log(), (X, Y)),
    "a cosine": (lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1), (X, Y)),
    "a scaled sum": (lambda x, y: torch.sub(x, y, alpha=0.5) * torch.rsub(x, 2.0, alpha=3), (X, Y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_rows_is_one_call_and_right(name: str) -> None:
    function, operands = FUNCTIONS[name]
    program = captured(function, operands)
    assert calls(program).count("fused_native") == 1
    results = lower(program)(*operands)
    plain = function(*operands)
    wide = function(*(x.double() if x.is_floating_point() else x for x in operands))
    for result, usual, exact in zip(
        results, *((v if isinstance(v, tuple) else (v,)) for v in (plain, wide)), strict=True
    ):
        assert result.dtype == usual.dtype and result.shape == usual.shape
        agree(result, exact.double() if exact.is_floating_point() else exact, usual)


def test_infinite_numbers_and_nan_are_as_in_pytorch() -> None:
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0, 88.0, 89.0, -87.0, -104.0, 1e-30, 1e4, -1e4, -10.0]])

    def function(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 1
        tame = (x.exp(), x.relu(), x.clamp(-1, 1), x.sigmoid(), x.tanh(), x.erf(), F.gelu(x), x.expm1(), x.log1p())
        return tuple(value * 1 for value in tame)

    results = lower(captured(function, (x,)))(x)
    torch.testing.assert_close(results, list(function(x)), rtol=1e-6, atol=1e-38, equal_nan=True)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=canonical_programs(max_operators=12))
def test_a_random_program_gives_the_same(program: Program) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_WORTH_IT", 0.0)
        executable = lower(program)
    wanted = program.callable()(*program.example)
    for result, expected in zip(executable(*program.example), wanted, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert result.shape == expected.shape and result.dtype == expected.dtype


def test_what_stands_between_two_parts_of_a_region_comes_before_it() -> None:
    """The product reads one result of the region and is written in front of the rest of it."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (x * 2).exp()
        product = scaled @ scaled.mT
        return (scaled + y).tanh() * y, product

    x, y = draw(2, 40, 40), draw(2, 40, 40, seed=1)
    results = lower(captured(function, (x, y)))(x, y)
    torch.testing.assert_close(results, list(function(x, y)), rtol=1e-5, atol=1e-4)


def test_other_sizes_than_those_of_the_capture() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y + 1).sigmoid() * (x - x.amax(-1, keepdim=True))

    program = captured(function, (X, Y), dynamic=(({0: batch}, {0: batch}),))
    assert "fused_native" in calls(program)
    executable = lower(program)
    for size in (2, 3, 7):
        x, y = draw(size, 40, 24), draw(size, 40, 24, seed=1)
        torch.testing.assert_close(executable(x, y)[0], function(x, y))
    apart = draw(24, 40, 5).permute(2, 1, 0)  # and other strides
    torch.testing.assert_close(executable(apart, draw(5, 40, 24))[0], function(apart, draw(5, 40, 24)))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_stay_as_they_are(kind: torch.dtype) -> None:
    assert "fused_native" not in calls(captured(lambda x, y: (x * y + 1).exp() - x, (X.to(kind), Y.to(kind))))


def test_little_beside_a_large_product_is_not_worth_a_kernel() -> None:
    layer = torch.nn.Linear(512, 512)
    program = capture(AsModule(lambda x, s: layer(x) * (s * 2 + 1)), (draw(64, 512), draw(1)))
    assert "fused_native" not in calls(program)
