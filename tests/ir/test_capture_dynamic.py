"""Symbolic sizes: which a call asks for, by every way that a forward takes its inputs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from regraft.guard import SymbolicGuard
from regraft.ir.capture import CaptureError, capture
from regraft.ir.capture_dynamic import is_symbol
from regraft.ir.nodes import size_equal
from regraft.ir.program import Program
from tests.support import AsModule


def symbolic(program: Program) -> list[list[bool]]:
    """For each size of each input tensor whether it is free."""
    return [[is_symbol(size) for size in node.meta["val"].shape] for node in program.user_inputs()]


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WIDE, NARROW = torch.zeros(2, 3), torch.zeros(1, 3)


class Variadic(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor, scale: Tensor, **named: Tensor) -> Tensor:
        return first + rest[0] * scale - named["shift"]


def test_true_makes_sizes_symbolic_where_the_model_allows() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4).eval()
    program = capture(model, (torch.randn(2, 4),), dynamic=True)
    assert symbolic(program) == [[True, False]]
    other = torch.randn(7, 4)
    torch.testing.assert_close(program.user_outputs(program.callable()(other)), model(other))


def test_an_export_specification_names_the_symbols() -> None:
    program = capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), dynamic={"input": {0: Dim("batch", max=64)}})
    assert symbolic(program) == [[True, False]]


def test_inputs_that_a_star_and_a_double_star_take_are_symbolic_too() -> None:
    def inputs(rows: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        first, second, scale, shift = torch.randn(4, rows, 3).unbind()
        return (first, second), {"shift": shift, "scale": scale}

    model = Variadic().eval()
    program = capture(model, *inputs(2), dynamic=True)
    assert symbolic(program) == [[True, True]] * 4
    args, kwargs = inputs(5)
    assert torch.equal(program.user_outputs(program.callable()(*args, *kwargs.values())), model(*args, **kwargs))
    assert "forward" not in vars(model)


def test_a_specification_names_what_a_double_star_takes_as_if_it_were_a_parameter() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, **named: Tensor) -> Tensor:
            return x + named["shift"]

    rows = {0: Dim("rows", min=2)}
    inputs = (torch.randn(2, 3),), {"shift": torch.randn(2, 3)}
    program = capture(Named().eval(), *inputs, dynamic={"x": rows, "shift": rows})
    assert symbolic(program) == [[True, False]] * 2


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "name"),
    [
        (nn.Linear(4, 4), (torch.zeros(1, 4),), {}, "input"),
        (Variadic(), (WIDE, NARROW), {"scale": WIDE, "shift": WIDE}, "rest[0]"),
        (Variadic(), (WIDE, WIDE), {"scale": WIDE, "shift": NARROW}, "shift"),
    ],
)  # fmt: skip
def test_an_example_size_of_one_is_refused_where_it_would_be_fixed(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str
) -> None:
    assert f"input {name} has size 1 along dimension 0" in refusal(model.eval(), args, kwargs, dynamic=True)


def test_a_model_that_fixes_every_size_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(2, 3)

    assert "only at the example's sizes (x [2, 3])" in refusal(Fixed().eval(), (torch.randn(2, 3),), dynamic=True)


def test_sizes_that_are_equal_as_parts_of_sums_are_one_symbol() -> None:
    def joined(first: Tensor, second: Tensor, kept: Tensor) -> Tensor:
        return torch.cat([first, second]) * torch.cat([kept, torch.ones_like(second)])

    program = capture(AsModule(joined).eval(), (torch.ones(2), torch.ones(3), torch.ones(2)), dynamic=True)
    first, _, kept = (node.meta["val"].shape[0] for node in program.user_inputs())
    assert is_symbol(first) and size_equal(first, kept)
    guard = SymbolicGuard(program)
    assert guard.fits([torch.ones(5), torch.ones(3), torch.ones(5)])
    assert not guard.fits([torch.ones(5), torch.ones(3), torch.ones(4)])
