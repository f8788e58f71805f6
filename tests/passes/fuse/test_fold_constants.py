"""Constant folding: what depends on no input is computed once, what may change or is huge is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regraft.ir.driver import Fuel, Session
from regraft.ir.program import Program
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.fuse.fold_constants import FoldConstants
from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import form
from tests.support import captured, run

X = numbers(4, 6)


def table(x: Tensor) -> Tensor:
    places = torch.arange(4.0)[:, None] / 10000 ** (torch.arange(6.0) / 6)
    return x * places.cos() + places.sin()


def folded(program: Program, folding: FoldConstants = FoldConstants(), fuel: int | None = None) -> Session:  # noqa: B008
    session = Session(fuel=Fuel(fuel))
    folding.run(program, session)
    DropDeadCode().run(program, session)
    return session


def test_position_tables_are_stored() -> None:
    program = captured(table, (X,))
    session = folded(program)
    assert form(program) in ("mul.Tensor(x0, w0); add.Tensor(0, w1)", "mul.Tensor(x0, w1); add.Tensor(0, w0)")
    assert torch.equal(run(program, (X,)), table(X))
    assert {a.exactness for a in session.log.applications} == {"bitwise"}


def test_only_what_others_read_is_stored() -> None:
    program = captured(table, (X,))
    folded(program)
    assert program.weight_count() == 2


def test_fuel_counts() -> None:
    program = captured(table, (X,))
    assert folded(program, fuel=1).applied == 1
    assert torch.equal(run(program, (X,)), table(X))


def test_large_tensors_are_computed_each_time() -> None:
    program = captured(table, (X,))
    assert folded(program, FoldConstants(largest_bytes=8)).applied == 0


def test_random_numbers_are_drawn_each_time() -> None:
    assert folded(captured(lambda x: x + torch.rand(4, 6), (X,))).applied == 0


def test_tables_of_symbolic_length_stay() -> None:
    sizes = (({0: torch.export.Dim("length", min=2, max=64)},),)
    program = captured(lambda x: x + torch.arange(x.shape[0])[:, None], (X,), dynamic=sizes)
    folded(program)
    longer = numbers(7, 6)
    assert torch.equal(run(program, (longer,)), longer + torch.arange(7)[:, None])


class Stateful(nn.Module):
    """Two buffers, of which one counts, and a parameter."""

    count: Tensor
    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(6))
        self.register_buffer("fixed", torch.ones(6))
        self.scale = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count.sin() + self.fixed.exp() + self.scale.cos()


def test_buffer_that_the_model_changes_is_not_folded() -> None:
    session = folded(captured(Stateful(), (X,)))
    assert {a.source_nodes for a in session.log.applications} == {("exp",), ("cos",)}


def test_what_is_made_of_large_parameters_is_not_stored_again() -> None:
    session = folded(captured(Stateful(), (X,)), FoldConstants(largest_parameter_bytes=8))
    assert [a.source_nodes for a in session.log.applications] == [("exp",)]


def test_the_operands_of_a_constant_that_is_too_large_are_stored() -> None:
    program = captured(lambda x: x + (torch.arange(6.0) * 2).sin().expand(4, 6), (X,))
    session = folded(program, FoldConstants(largest_bytes=24))
    assert form(program) == "expand(w0, [4, 6]); add.Tensor(x0, 0)"
    assert [a.source_nodes for a in session.log.applications] == [("sin",)]
    assert torch.equal(run(program, (X,)), X + (torch.arange(6.0) * 2).sin())
