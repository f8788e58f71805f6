"""Linear layers: merged over one input, joined with what follows, cut down to what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.rule import Rule
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.fuse.dead_output import DropUnreadColumns, DropUnreadRows
from regraft.passes.fuse.linear_epilogue import LinearActivation, LinearResidual
from regraft.passes.fuse.linear_rows import LinearOfAllRows
from regraft.passes.fuse.merge_linears import MergeLinears
from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import form
from tests.support import apply, captured, run

X = numbers(2, 3, 8)


class Layers(nn.Module):
    """Linear layers a, b (with bias), c (without) and d (8 to 8), in whatever way ``function`` uses them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(8, 5, bias=False), nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def rewritten(function: Callable[..., Any], *rules: Rule) -> tuple[Program, Session]:
    """The program after ``rules``, checked against the model."""
    model = Layers(function)
    program = captured(model, (X,))
    session = apply(program, rules)
    DropDeadCode().run(program, session)
    for result, expected in zip(tree_leaves(run(program, (X,))), tree_leaves(model(X)), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=1e-5)
    return program, session


def test_layers_of_one_input_are_slices_of_one() -> None:
    program, _ = rewritten(lambda m, x: (m.a(x), m.b(x)), MergeLinears())
    assert form(program).startswith("linear(x0, w")
    assert form(program).endswith("slice.Tensor(0, -1, 0, 4); slice.Tensor(0, -1, 4, 10)")
    assert [op.op for op in program.weights.derived.values()] == ["concat", "concat"]


def test_missing_bias_becomes_zeros() -> None:
    program, _ = rewritten(lambda m, x: (m.a(x), m.c(x)), MergeLinears())
    assert sorted(op.op for op in program.weights.derived.values()) == ["concat", "concat", "zero_bias"]


def test_layers_without_any_bias_get_none() -> None:
    program, _ = rewritten(lambda m, x: (F.linear(x, m.a.weight), m.c(x)), MergeLinears())
    assert [op.op for op in program.weights.derived.values()] == ["concat"]


def test_layers_of_different_inputs_stay_apart() -> None:
    _, session = rewritten(lambda m, x: (m.a(x), m.b(x + 1)), MergeLinears())
    assert session.applied == 0


def weights(*rows: int) -> tuple[Tensor, ...]:
    return tuple(numbers(size, 8) for size in rows)


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        pytest.param((16, 16, 1), [(32, 8)], id="a gate stays beside query and key"),
        pytest.param((16, 1, 3), [(4, 8)], id="gates are merged among themselves"),
        pytest.param((16, 3, 32, 5), [(8, 8), (48, 8)], id="each with its like"),
    ],
)
def test_layers_of_odd_widths_do_not_part_the_others_from_whole_vectors(
    rows: tuple[int, ...], merged: list[tuple[int, int]]
) -> None:
    tensors = nn.ParameterList([nn.Parameter(weight) for weight in weights(*rows)])

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = tensors

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(F.linear(x, weight) for weight in self.weights)

    program = captured(Parts(), (X,))
    apply(program, (MergeLinears(),))
    derived = [tuple(program.weights.get(name).shape) for name in program.weights.derived]
    assert sorted(derived) == merged


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        pytest.param(lambda m, x: (m.a(x[:, :-1]), m.b(x[:, 1:])), 1, id="each row beside the next"),
        pytest.param(lambda m, x: (m.a(x[:, 1:]), m.b(x)), 1, id="all rows but one, and all"),
        pytest.param(lambda m, x: m.a(x[:, 1:]), 1, id="one layer alone"),
        pytest.param(lambda m, x: (m.a(x[:, 5:]), m.b(x)), 2, id="few enough rows to be worth a slice"),
        pytest.param(lambda m, x: (m.a(x[:, :32]), m.b(x[:, 32:])), 2, id="each row once"),
    ],
)
def test_layers_of_nearly_all_rows_are_merged(function: Callable[..., Any], layers: int) -> None:
    model, x = Layers(function), numbers(2, 64, 8)
    program = captured(model, (x,))
    session = apply(program, (LinearOfAllRows(), MergeLinears()))
    DropDeadCode().run(program, session)
    products = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(products) == layers
    assert (products[0].meta["val"].shape[1] == 64) == (layers == 1 and len(tree_leaves(model(x))) > 1)
    for result, expected in zip(tree_leaves(run(program, (x,))), tree_leaves(model(x)), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.relu, torch.sigmoid, torch.tanh])
def test_activation_joins_the_layer(activation: Callable[[Tensor], Tensor]) -> None:
    program, _ = rewritten(lambda m, x: activation(m.a(x)), LinearActivation())
    assert form(program).startswith("regraft.linear(x=x0") and ";" not in form(program)


def test_activation_stays_where_the_product_is_read_too() -> None:
    _, session = rewritten(lambda m, x: (m.a(x).relu(), m.a(x)), LinearActivation())
    assert session.applied == 0


def test_residual_joins_the_layer() -> None:
    program, _ = rewritten(lambda m, x: x + m.d(x), LinearResidual())
    assert ";" not in form(program)


def test_activation_and_residual_join_one_after_the_other() -> None:
    program, session = rewritten(lambda m, x: m.d(x).relu() + x, LinearActivation(), LinearResidual())
    assert ";" not in form(program) and session.applied == 2


def test_a_layer_is_no_residual_of_its_own() -> None:
    def doubled(model: Any, x: Tensor) -> Tensor:
        product: Tensor = model.d(x)
        return product + product

    _, session = rewritten(doubled, LinearResidual())
    assert session.applied == 0 and not session.log.of("linear-residual").rolled_back


def test_second_residual_stays_a_sum() -> None:
    program, session = rewritten(lambda m, x: m.d(x) + x + x.sin(), LinearResidual())
    assert session.applied == 1 and form(program).count("add") == 1


def test_broadcast_residual_stays_a_sum() -> None:
    _, session = rewritten(lambda m, x: m.d(x) + x[:, :1], LinearResidual())
    assert session.applied == 0


def test_last_row_alone_is_computed() -> None:
    program, _ = rewritten(lambda m, x: m.a(x)[:, -1], DropUnreadRows())
    assert form(program).startswith("slice.Tensor(x0, -2, 2, 3); linear(0,")
    assert form(program).endswith("select.int(1, -2, 0)")


def test_rows_stay_where_others_are_read() -> None:
    _, session = rewritten(lambda m, x: (m.a(x)[:, -1], m.a(x).sum()), DropUnreadRows())
    assert session.applied == 0


def test_columns_that_nobody_reads_are_not_computed() -> None:
    program, _ = rewritten(lambda m, x: m.b(x)[..., 1:4], DropUnreadColumns())
    assert form(program).startswith("linear(x0") and ";" not in form(program)
    assert all(op.options == {"dim": 0, "start": 1, "end": 4} for op in program.weights.derived.values())


def test_columns_stay_where_others_are_read() -> None:
    _, session = rewritten(lambda m, x: (m.b(x)[..., :2], m.b(x)[..., 2:]), DropUnreadColumns())
    assert session.applied == 0
