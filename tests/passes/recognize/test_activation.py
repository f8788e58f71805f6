"""Activation functions written out become one operator; their names are read back from the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.ops.activation import ACTIVATIONS, activation_name
from regraft.passes.recognize import activation, activation_examples, gelu
from tests.support import apply, captured

RULES = (
    activation.RecognizeSilu(),
    activation.RecognizeQuickGelu(),
    activation.RecognizeReluSquared(),
    gelu.RecognizeGelu(),
    gelu.RecognizeGeluTanh(),
)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (lambda x: torch.relu(x) ** 2, "relu_squared"),
        (activation_examples.gelu, "gelu"),
        (activation_examples.gelu_new, "gelu_tanh"),
        (torch.nn.functional.gelu, "gelu"),
        (torch.tanh, "tanh"),
        (torch.exp, None),
    ],
)
def test_activation_is_named(written: activation_examples.Function, name: str | None) -> None:
    program = captured(written, (torch.randn(4, 8),))
    apply(program, RULES)
    (result,) = program.output_node.all_input_nodes
    assert activation_name(result) == name


def test_fp16_gelu_written_out_comes_closer_to_fp64() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()
    program = captured(activation_examples.gelu_new, (x,))
    session = apply(program, RULES)
    (application,) = session.log.applications
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    result = program.callable()(x)[0]
    written = activation_examples.gelu_new(x)
    assert application.recognizes == "activation"
    assert (result.double() - exact).norm() <= (written.double() - exact).norm()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_operator_conforms(name: str) -> None:
    torch.library.opcheck(ops.activation, (torch.randn(3, 5), name))


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swoosh'; known: none, relu"):
        ops.activation(torch.zeros(1), "swoosh")


def test_sigmoid_of_another_tensor_is_no_silu() -> None:
    def gated(x: Tensor, y: Tensor) -> Tensor:
        return x * torch.sigmoid(y)

    program = captured(gated, (torch.randn(4), torch.randn(4)))
    assert not apply(program, RULES).log.applications
