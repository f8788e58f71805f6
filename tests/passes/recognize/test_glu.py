"""Gated linear units are found by structure: two projections of one input, one of them activated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.passes.recognize.activation import RecognizeQuickGelu, RecognizeReluSquared, RecognizeSilu
from regraft.passes.recognize.glu import RecognizeGlu, RecognizeTorchGlu
from tests.support import apply, captured, run

RULES = (RecognizeSilu(), RecognizeQuickGelu(), RecognizeReluSquared(), RecognizeTorchGlu(), RecognizeGlu())


class Feedforward(nn.Module):
    """A gated feed-forward layer, packed or not."""

    def __init__(self, activation: Any, packed: bool) -> None:
        super().__init__()
        self.activation = activation
        self.packed = packed
        self.gate = nn.Linear(8, 24 if packed else 12, bias=False)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.packed else (self.gate(x), self.up(x))
        return self.down(up * self.activation(gate))


def units(program: Program) -> list[str]:
    """The activation of each unit in the graph."""
    return [arguments(node)["activation"] for node in program.graph.nodes if node.target is ops.glu]


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.relu, "relu"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (lambda x: F.relu(x).square(), "relu_squared"),
        (F.mish, "mish"),
        (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
        (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
        (lambda x: x * F.hardsigmoid(x), "hardswish"),
        (F.elu, "elu"),
        (F.leaky_relu, "leaky_relu"),
        (F.softplus, "softplus"),
    ],
)
def test_unit_is_found_with_its_activation(activation: Any, name: str, packed: bool) -> None:
    torch.manual_seed(0)
    model, x = Feedforward(activation, packed), torch.randn(2, 3, 8)
    program = captured(model, (x,))
    apply(program, RULES)
    assert units(program) == [name]
    torch.testing.assert_close(run(program, (x,)), model(x))


def test_torch_glu_gates_the_first_half_by_the_second() -> None:
    weight, x = torch.randn(24, 8), torch.randn(2, 8)
    program = captured(lambda x, w: F.glu(F.linear(x, w)), (x, weight))
    apply(program, RULES)
    first, second = F.linear(x, weight).chunk(2, -1)
    assert units(program) == ["sigmoid"]
    torch.testing.assert_close(run(program, (x, weight)), first * torch.sigmoid(second))


@pytest.mark.parametrize("rules", [RULES, RULES[::-1]], ids=["silu first", "glu first"])
def test_product_with_its_own_sigmoid_is_silu(rules: Any) -> None:
    program = captured(lambda x, w: (h := F.linear(x, w)) * torch.sigmoid(h), (torch.randn(2, 8), torch.randn(4, 8)))
    session = apply(program, rules)
    assert session.log.recognized() == {"activation": 1}


def test_gated_attention_output_is_no_unit() -> None:
    def gated(x: Tensor, w: Tensor) -> Tensor:
        scores = torch.softmax(x @ x.transpose(-1, -2), -1)
        return (scores @ x) * torch.sigmoid(F.linear(x, w))

    program = captured(gated, (torch.randn(2, 3, 8), torch.randn(8, 8)))
    session = apply(program, RULES)
    assert units(program) == []
    assert [r.reason for r in session.log.refusals] == ["gate and up are projections of different inputs"]
