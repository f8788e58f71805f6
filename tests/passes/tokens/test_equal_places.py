"""What is called equal is equal for any input, and equal places are found where a graph makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft.ir.program import Program
from regraft.passes.tokens.equal_places import EqualPlaces, Labels
from tests.passes.tokens.models import recognised, values
from tests.strategies import canonical_programs

WIDTH = 4


class Function(nn.Module):
    """A function of an input ``[2, 3, 4]``, of weights, and of a buffer that each call changes."""

    def __init__(self, function: Callable[[Function, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.table = nn.Parameter(torch.tensor([[0.0], [1.0], [0.0]]).expand(3, WIDTH).clone())
        self.register_buffer("count", torch.zeros(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def labels(function: Callable[[Function, Tensor], Tensor], dim: int = -2) -> Labels:
    program = recognised(Function(function), (torch.randn(2, 3, WIDTH),))
    (result,) = program.output_node.args[0][-1:]
    return EqualPlaces(program).of(result, dim)


def counted(self: Function, x: Tensor) -> Tensor:
    self.count.add_(1)
    return x[:, :1] * self.count


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: x, None),
        (lambda self, x: x[:, :1].expand(-1, 3, -1), (0, 0, 0)),
        (lambda self, x: x.repeat(1, 2, 1), (0, 1, 2, 0, 1, 2)),
        (lambda self, x: x.repeat_interleave(2, 1), (0, 0, 2, 2, 4, 4)),
        (lambda self, x: x[:, None].expand(-1, 2, -1, -1).reshape(2, 6, WIDTH), (0, 1, 2, 0, 1, 2)),
        (lambda self, x: torch.cat((x, self.token.expand(2, 2, -1)), 1), (0, 1, 2, 3, 3)),
        (lambda self, x: torch.cat((x, x.sin(), x), 1), (0, 1, 2, 3, 4, 5, 0, 1, 2)),
        (lambda self, x: torch.stack([x[:, 0]] * 3, 1), (0, 0, 0)),
        (lambda self, x: F.pad(x, (0, 0, 1, 2)), (0, 1, 2, 3, 0, 0)),
        (lambda self, x: F.pad(x, (0, 0, 2, 0))[:, 1:], None),
        (lambda self, x: F.pad(x, (0, 0, 2, 1))[:, 1:], (0, 1, 2, 3, 0)),
        (lambda self, x: F.pad(x, (0, 0, 0, 2))[:, ::2], None),
        (lambda self, x: self.layer(F.pad(x, (0, 0, 0, 2))), (0, 1, 2, 3, 3)),
        (lambda self, x: self.norm(F.pad(x, (0, 0, 0, 2))).tanh(), (0, 1, 2, 3, 3)),
        (lambda self, x: F.pad(x, (0, 0, 0, 2)) @ self.layer.weight, (0, 1, 2, 3, 3)),
        (lambda self, x: x[:, :1] * self.table, (0, 1, 0)),
        (lambda self, x: x[:, :1] * self.table + x, None),
        (lambda self, x: x.repeat(1, 2, 1) + x[:, :1].repeat_interleave(6, 1), (0, 1, 2, 0, 1, 2)),
        (lambda self, x: x.repeat(1, 2, 1) + torch.arange(6.0)[:, None], None),
        (lambda self, x: x[:, :1] + torch.ones_like(x), (0, 0, 0)),
        (lambda self, x: x[:, :1] + torch.rand(3, 1), None),
        (lambda self, x: F.softmax(F.pad(x, (0, 0, 0, 2)), 1), None),
        (lambda self, x: F.pad(x, (0, 0, 0, 2)).cumsum(1), None),
        (counted, None),
    ],
)
def test_places_that_the_graph_makes_equal(
    function: Callable[[Function, Tensor], Tensor], expected: tuple[int, ...] | None
) -> None:
    assert labels(function) == expected


def test_an_embedding_of_equal_indices() -> None:
    assert labels(lambda self, x: F.embedding(F.pad((x[..., 0] > 0).long(), (0, 2)), self.table)) == (0, 1, 2, 3, 3)


def test_a_constant_that_is_too_long_to_compute_is_understood_by_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.ir.probe._CONE_LIMIT", 1)
    assert labels(lambda self, x: x[:, :1] * self.token.expand(1, 3, -1)) == (0, 0, 0)
    assert labels(lambda self, x: x[:, :1] * (self.table + 1)) == (0, 1, 0)
    assert labels(lambda self, x: x[:, :1] * self.table.roll(0, 0)) is None


_MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "tile": lambda x: x.repeat(1, 2, 1),
    "copy": lambda x: x.repeat_interleave(2, 1),
    "pad": lambda x: F.pad(x, (0, 0, 1, 2)),
    "turn": lambda x: x.transpose(1, 2),
    "twice": lambda x: torch.cat((x, x), 2),
    "cut": lambda x: x[:, 1:],
    "every second": lambda x: x[:, :, ::2],
    "first": lambda x: x[:, :1].expand(-1, 3, -1),
    "join": lambda x: x.reshape(2, -1, 2) if x[0].numel() % 2 == 0 else x,
    "heads": lambda x: x.reshape(2, x.shape[1], 1, -1).permute(0, 2, 1, 3)[:, 0],
    "sum": lambda x: x + x.mean(1, keepdim=True),
    "places": lambda x: x * (torch.arange(x.shape[1]) % 3)[:, None],
    "wave": torch.sin,
}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(sorted(_MOVES)), min_size=1, max_size=5))
def test_what_is_called_equal_is_equal(names: list[str]) -> None:
    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for name in names:
                x = _MOVES[name](x)
            return x

    check(recognised(Moved(), (torch.randn(2, 4, 3, dtype=torch.float64),)))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(canonical_programs(dtypes=(torch.float64,)))
def test_what_is_called_equal_is_equal_in_any_program(program: Program) -> None:
    check(program)


def check(program: Program) -> None:
    """Whatever is called equal in a program is, on its example."""
    equal, held = EqualPlaces(program), values(program)
    for node, value in held.items():
        if not isinstance(value, Tensor):
            continue
        for dim in range(-value.dim(), 0):
            for place, label in enumerate(equal.of(node, dim) or ()):
                torch.testing.assert_close(value.select(dim, place), value.select(dim, label), equal_nan=True)
