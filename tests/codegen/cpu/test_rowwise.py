"""Operators on rows equal their formulas in fp64, and never write to what they were given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu.rowwise import add_norm, glu, rms_norm, rope_half
from regraft.ir.ops.activation import ACTIVATIONS, activate
from regraft.ir.verify import relative_l2


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


@pytest.mark.parametrize("weight", [None, draw(8, seed=2)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norms(offset: float, weight: Tensor | None) -> None:
    x = draw(3, 8)
    scale = 1.0 if weight is None else weight.double() + offset
    expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * scale
    assert relative_l2(rms_norm(x, weight, 1e-5, offset, "late").double(), expected) <= 1e-6


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


@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("wide_tables", [True, False])
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_rope_of_halves(layout: str, wide_tables: bool, rotary_dim: int) -> None:
    """Element i of the first half turns with element i of the second by its position's angle."""
    x = draw(2, 3, 5, 8)
    if layout == "transposed":
        x = draw(2, 5, 3, 8).transpose(1, 2)
    half = rotary_dim // 2
    angles = torch.arange(5.0)[:, None] * (0.3 ** torch.arange(half))
    tables = torch.cat([angles, angles], -1) if wide_tables else angles
    result = rope_half(x, tables.cos(), tables.sin(), rotary_dim)
    paired = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double())
    turned = paired * torch.polar(torch.ones_like(angles).double(), angles.double())
    expected = torch.cat([turned.real, turned.imag, x[..., rotary_dim:].double()], -1)
    assert relative_l2(result.double(), expected) <= 1e-6
