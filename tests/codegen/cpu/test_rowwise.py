"""Operators on rows equal their formulas in fp64, and never write to what they were given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.rowwise import (
    add_norm,
    add_norm_native,
    glu,
    norm_native,
    rms_norm,
    rope_half,
    rope_native,
    silu_glu_native,
)
from regraft.ir import ops
from regraft.ir.ops.activation import ACTIVATIONS, activate
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native
from tests.support import captured

aten = torch.ops.aten


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates(activation: str) -> None:
    gate, up = draw(3, 8), draw(3, 8, seed=1)
    kept = gate.clone()
    result = glu(gate, up, activation)
    assert relative_l2(result.double(), activate(gate.double(), activation) * up.double()) <= 1e-6
    assert torch.equal(gate, kept)


def test_a_gate_of_lower_precision_takes_the_wider_type() -> None:
    assert glu(draw(3, 8).bfloat16(), draw(3, 8), "silu").dtype == torch.float32


@needs_native
@pytest.mark.parametrize("size", [1, 8, 37, 200])
def test_native_gates_of_any_size_and_stride(size: int) -> None:
    both = draw(3, 2 * size) * 30
    gate, up = both.chunk(2, -1)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert relative_l2(silu_glu_native(gate, up).double(), expected) <= 1e-6


@needs_native
def test_native_gates_at_the_ends_of_the_number_line() -> None:
    gate = torch.tensor([[0.0, -100.0, 100.0, -3e38, 3e38, float("nan"), float("inf"), -float("inf")]])
    result = silu_glu_native(gate, torch.ones_like(gate))
    torch.testing.assert_close(result, torch.nn.functional.silu(gate), equal_nan=True)


def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> Tensor:
    return norm_native(x, weight, None, eps, offset, False)


@pytest.mark.parametrize("function", [rms_norm, pytest.param(rms_norm_native, marks=needs_native)])
@pytest.mark.parametrize("size", [8, 37, 200])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norms(offset: float, weighted: bool, size: int, function: Callable[..., Tensor]) -> None:
    x, weight = draw(6, size)[::2], draw(size, seed=2) if weighted else None
    scale = 1.0 if weight is None else weight.double() + offset
    expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * scale
    assert relative_l2(function(x, weight, 1e-5, offset, "late").double(), expected) <= 1e-6


@needs_native
@pytest.mark.parametrize("size", [1, 8, 37, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_native_layer_norm(weighted: bool, size: int) -> None:
    """Rows far from zero keep their digits."""
    x = draw(6, size)[::2] + 100
    weight, bias = (draw(size, seed=2), draw(size, seed=3)) if weighted else (None, None)
    wide = [None if tensor is None else tensor.double() for tensor in (weight, bias)]
    expected = torch.nn.functional.layer_norm(x.double(), (size,), *wide, 1e-5)
    assert relative_l2(norm_native(x, weight, bias, 1e-5, 0.0, True).double(), expected) <= 1e-5


@needs_native
@pytest.mark.parametrize("size", [8, 37])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu", "sigmoid", "tanh"])
def test_a_norm_with_its_activation(name: str, size: int) -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        normed = torch.nn.functional.layer_norm(x, (size,))
        return activate(normed, name), activate(rms(x * 2), name)

    def rms(x: Tensor) -> Tensor:
        found: Tensor = ops.rms_norm(x, None, 1e-5)
        return found

    x = draw(2, 5, size)
    executable = lower(captured(model, (x,)))
    called = [node.target for node in executable.module.graph.nodes if node.op == "call_function"]
    assert called.count(norm_native) == 2 and len(called) <= 3, "no call but the sum's"
    for found, wanted in zip(executable(x), model(x.double()), strict=True):
        assert relative_l2(found.double(), wanted) <= 2e-6


def test_tokens_of_an_image_are_copied_once_for_a_norm_and_its_residual() -> None:
    weight, x = draw(8, 8, seed=1), draw(2, 8, 3, 5)

    def model(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        linear = torch.nn.functional.linear(torch.nn.functional.layer_norm(tokens, (8,)), weight.to(x.dtype))
        return tokens + linear

    executable = lower(captured(model, (x,)))
    assert relative_l2(executable(x)[0].double(), model(x.double())) <= 2e-6
    copies = [node for node in executable.module.graph.nodes if node.target is aten.reshape.default and turned(node)]
    assert len(copies) == 1


def turned(node: fx.Node) -> bool:
    """Whether a reshape is of a permutation."""
    source = node.args[0]
    return isinstance(source, fx.Node) and source.target is aten.permute.default


@needs_native
def test_a_norm_that_is_read_beside_its_activation_stays() -> None:
    def model(x: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, (8,))
        return torch.nn.functional.gelu(normed) + normed

    x = draw(3, 8)
    (found,) = lower(captured(model, (x,)))(x)
    assert relative_l2(found.double(), model(x.double())) <= 2e-6


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_a_sum_and_its_norm(kind: str) -> None:
    x, residual, weight = draw(3, 8), draw(3, 8, seed=1), draw(8, seed=2)
    bias = draw(8, seed=3) if kind == "layer_norm" else None
    normed, total = add_norm(x, residual, weight, bias, 1e-5, kind, 0.0, "late")
    wide = x.double() + residual.double()
    centred = wide - wide.mean(-1, keepdim=True) if kind == "layer_norm" else wide
    expected = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert relative_l2(normed.double(), expected + (0 if bias is None else bias.double())) <= 1e-6
    assert relative_l2(total.double(), wide) <= 1e-7


@needs_native
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 37), (1, 200)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_a_native_sum_and_its_norm(kind: str, weighted: bool, shape: tuple[int, ...]) -> None:
    x, residual, weight = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2) if weighted else None
    offset = 1.0 if kind == "rms_norm" else 0.0
    given = add_norm_native(x, residual, weight, None, 1e-5, offset, kind == "layer_norm")
    wide = (x.double(), residual.double(), None if weight is None else weight.double(), None)
    expected = add_norm(*wide, 1e-5, kind, offset, "late")
    assert all(relative_l2(a.double(), b) <= 1e-6 for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("function", [rope_half, pytest.param(rope_native, marks=needs_native)])
@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("wide_tables", [True, False])
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_rope_of_halves(layout: str, wide_tables: bool, rotary_dim: int, function: Callable[..., Tensor]) -> None:
    """Element i of the first half turns with element i of the second by its position's angle."""
    x = draw(2, 3, 5, 8)
    if layout == "transposed":
        x = draw(2, 5, 3, 8).transpose(1, 2)
    half = rotary_dim // 2
    angles = torch.arange(5.0)[:, None] * (0.3 ** torch.arange(half))
    tables = torch.cat([angles, angles], -1) if wide_tables else angles
    result = function(x, tables.cos(), tables.sin(), rotary_dim)
    paired = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double())
    turned = paired * torch.polar(torch.ones_like(angles).double(), angles.double())
    expected = torch.cat([turned.real, turned.imag, x[..., rotary_dim:].double()], -1)
    assert relative_l2(result.double(), expected) <= 1e-6


@needs_native
@pytest.mark.parametrize("pairs", [3, 16, 40])
def test_native_rope_of_many_sizes_with_a_table_a_batch(pairs: int) -> None:
    """Also: a table that differs from batch to batch, and the result lies in memory as the input does."""
    x = draw(2, 5, 3, 2 * pairs + 1).transpose(1, 2)
    cos, sin = draw(2, 1, 5, 2 * pairs, seed=1), draw(2, 1, 5, 2 * pairs, seed=2)
    given = rope_native(x, cos, sin, 2 * pairs)
    assert relative_l2(given, rope_half(x, cos, sin, 2 * pairs)) <= 1e-6
    assert given.stride() == x.stride()


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20)),
    order=st.permutations([0, 1, 2]),
    margin=st.integers(0, 5),
    step=st.integers(1, 2),
)
def test_native_norms_and_gates_of_rows_that_lie_anywhere(
    sizes: tuple[int, int, int, int], order: list[int], margin: int, step: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    *leading, size = sizes
    wide = torch.randn(*(step * n for n in leading), size + margin, generator=generator)
    x = wide[::step, ::step, ::step, margin:].permute(*order, 3)
    y = torch.randn(x.shape, generator=generator)
    exact = x.double()
    away = exact - exact.mean(-1, keepdim=True)
    wanted = away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm_native(x, None, None, 1e-5, 0.0, True), wanted.float(), rtol=1e-4, atol=1e-5)
    normed, total = add_norm_native(y, x, None, None, 1e-5, 0.0, False)
    summed = exact + y.double()
    torch.testing.assert_close(total, summed.float())
    root = (summed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed, (summed / root).float(), rtol=1e-4, atol=1e-5)
    gated = exact * torch.sigmoid(exact) * y.double()
    torch.testing.assert_close(silu_glu_native(x, y), gated.float(), rtol=1e-4, atol=1e-5)
