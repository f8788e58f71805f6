"""A program: a graph whose placeholders are named weights and user inputs, and which runs as the model does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import capture
from regraft.ir.program import Program
from regraft.ir.weights import WeightOp
from tests.support import run

aten = torch.ops.aten
X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Tied(nn.Module):
    """Two layers that share one weight, and a buffer that counts calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        return {"y": self.second(self.first(x)), "calls": self.calls.clone()}


def tied() -> tuple[Tied, Program]:
    model = Tied().eval()
    return model, capture(model, (X,))


def test_inputs_and_weights_are_told_apart() -> None:
    _, program = tied()
    names = {program.weight_name(node) for node in program.weight_placeholders()}

    assert [node.op for node in program.user_inputs()] == ["placeholder"]
    assert program.weight_name(program.user_inputs()[0]) is None
    assert {"first.bias", "calls"} < names
    assert "first.bias" in program.parameters() and "calls" not in program.parameters()


def test_weights_are_the_models_own_and_tied_ones_are_one_tensor() -> None:
    model, program = tied()
    held = [program.weights.get(name).data_ptr() for name in program.parameters() if "weight" in name]
    assert set(held) == {model.first.weight.data_ptr()}
    assert program.weights.nbytes() == (9 + 3 + 1) * 4


def test_user_structure_comes_back_and_mutation_outputs_do_not() -> None:
    model, program = tied()
    flat = program.callable()(X)

    assert list(program.mutated().values()) == ["calls"] and len(flat) == 3
    outputs = program.user_outputs(flat)
    assert set(outputs) == {"y", "calls"}
    torch.testing.assert_close(outputs["y"], model.second(model.first(X)))


def test_derived_weight_is_a_placeholder_made_once() -> None:
    _, program = tied()
    op = WeightOp("permute", ("first.weight",), {"dims": [1, 0]})
    before = program.weight_count()

    first, second = program.derive_weight("t", op), program.derive_weight("t", op)

    assert first is second and program.weight_count() == before + 1
    assert program.weight_name(first) == "t" and first.meta["val"].shape == (3, 3)
    assert torch.equal(program.weights.get("t"), program.weights.get("first.weight").T)


def test_forgotten_weight_leaves_no_trace() -> None:
    _, program = tied()
    before = (program.weight_count(), len(program.graph.nodes), len(program.signature.input_specs))

    program.forget_weight(program.derive_weight("t", WeightOp("permute", ("first.weight",), {"dims": [1, 0]})))
    program.forget_weight(program.add_constant("table", torch.ones(2)))

    assert (program.weight_count(), len(program.graph.nodes), len(program.signature.input_specs)) == before
    assert "t" not in program.weights and "table" not in program.weights
    run(program, (X,))


def test_constant_takes_part_in_the_run() -> None:
    program = capture(nn.Identity(), (X,))
    table = program.add_constant("table", torch.full((2, 3), 2.0))
    (x,) = program.user_inputs()
    with program.graph.inserting_before(program.output_node):
        product = program.graph.call_function(aten.mul.Tensor, (x, table))
    program.output_node.args = ((product,),)

    (result,) = program.callable()(X)
    assert torch.equal(result, 2 * X)


def test_unused_weights_are_dropped_but_mutated_buffers_stay() -> None:
    _, program = tied()
    program.derive_weight("t", WeightOp("permute", ("first.weight",), {"dims": [1, 0]}))

    program.drop_unused_weights()

    assert "t" not in program.weights and "calls" in program.weights
    run(program, (X,))


def test_copy_is_independent() -> None:
    model, program = tied()
    twin = program.copy()
    bias = next(n for n in twin.weight_placeholders() if twin.weight_name(n) == "first.bias")
    (linear,) = bias.users
    linear.args = linear.args[:2]
    twin.drop_unused_weights()

    assert "first.bias" in program.weights and "first.bias" not in twin.weights
    torch.testing.assert_close(run(program, (X,))["y"], model.second(model.first(X)))
    without_bias = X @ model.first.weight.T @ model.first.weight.T
    torch.testing.assert_close(run(twin, (X,))["y"], without_bias.detach())


def test_copy_keeps_metadata_and_names() -> None:
    _, program = tied()
    twin = program.copy()
    assert [n.name for n in twin.graph.nodes] == [n.name for n in program.graph.nodes]
    calls = [(a, b) for a, b in zip(program.graph.nodes, twin.graph.nodes, strict=True) if a.op == "call_function"]
    assert all(a.meta["val"] is b.meta["val"] for a, b in calls)


def test_wrong_number_of_inputs_is_refused() -> None:
    _, program = tied()
    with pytest.raises(ValueError):
        program.callable()(X, X)
