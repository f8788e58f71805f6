"""In-place operators become functional where they stand if nothing else looks at what they write, else in the slow way;
either way the program computes what the model does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.ir import capture as capture_module
from regraft.ir.capture import capture

X = torch.linspace(-2, 3, 24).reshape(4, 6)


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.convolution = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def routed(x: Tensor) -> Tensor:
    values, index = torch.topk(x.softmax(-1), 2)
    values /= values.sum(-1, keepdim=True)
    return values * index


def inverted(x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(4)
    return x[back]


def read_before_and_after(x: Tensor) -> Tensor:
    y = x * 2
    before = y.sum()
    y.add_(1).mul_(3)
    return y + before


def with_itself(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(y)
    return y


def viewed(x: Tensor) -> Tensor:
    y = x * 2
    row = y[0]
    y.add_(1)
    return y + row


def a_part_written(x: Tensor) -> Tensor:
    y = x * 2
    y[1].fill_(7)
    return y


def returned_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y, y.add_(1)


def through_what_may_return_its_operand(x: Tensor) -> Tensor:
    y = x * 2
    z = F.dropout(y, 0.5, False)
    y.add_(1)
    return y * z


def returned_from_a_dropout(x: Tensor) -> Tensor:
    y = x * 2
    y[0] = 1
    return F.dropout(y, 0.5, False)


def written_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(-1)
    z.mul_(2)
    return y


def of_another_type(x: Tensor) -> Tensor:
    y = (x * 2).to(torch.int64)
    y.add_(torch.tensor(3))
    return y.float()


def laid_out_otherwise(x: Tensor) -> Tensor:
    y = torch.empty_strided((4, 6), (1, 4)).zero_() + 0
    y.copy_(x)
    return y.relu_() + 1


FAST = [routed, inverted, read_before_and_after, with_itself]
SLOW = [
    viewed,
    a_part_written,
    returned_twice,
    through_what_may_return_its_operand,
    returned_from_a_dropout,
    written_through_a_view,
    of_another_type,
    laid_out_otherwise,
]


@pytest.mark.parametrize("function", [*FAST, *SLOW])
def test_a_program_with_in_place_operators_is_functional_and_right(
    function: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if function in FAST:
        monkeypatch.setattr(capture_module, "_decompose", None)
    program = capture(Model(function).eval(), (X.clone(),))
    assert not any(n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))
    expected = function(X.clone())
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for found, value in zip(program.callable()(X.clone()), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)


def test_an_activation_in_place_behind_a_layer_needs_no_second_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_decompose", None)
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.SiLU(inplace=True)).eval()
    (found,) = capture(model, (X[None],)).callable()(X[None])
    torch.testing.assert_close(found, model(X[None]).detach(), rtol=0, atol=0)


def test_the_model_s_own_tensors_are_no_new_ones() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x + self.seen

    assert [spec.target for spec in capture(Counts().eval(), (X,)).signature.output_specs if spec.target] == ["seen"]


def test_sizes_that_are_symbols_stay_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_decompose", None)
    program = capture(Model(routed).eval(), (X,), dynamic=True)
    (found,) = program.callable()(X[:3])
    torch.testing.assert_close(found, routed(X[:3]), rtol=0, atol=0)


STEPS: list[Callable[[list[Tensor], int, int], object]] = [
    lambda held, a, b: held.append(held[a] * 2 + held[b]),
    lambda held, a, b: held.append(held[a].view(-1).view(4, 6)),
    lambda held, a, b: held.append(held[a].sigmoid()),
    lambda held, a, b: held.append(held[a].add_(held[b])),
    lambda held, a, b: held.append(held[a].mul_(0.5)),
    lambda held, a, b: held[a][:2].sub_(held[b][:2].clone()),
    lambda held, a, b: held.append(held[a].clamp_(-1, 1)),
    lambda held, a, b: held.append(F.dropout(held[a], 0.5, False)),
    lambda held, a, b: held.append(held[a].masked_fill_(held[b] > 1, 0.25)),
]


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 20), st.integers(0, 20)), max_size=8))
def test_any_order_of_views_and_writes_computes_what_the_model_does(steps: list[tuple[int, int, int]]) -> None:
    def function(x: Tensor) -> Tensor:
        held = [x + 1, x * 0.5]
        for number, a, b in steps:
            STEPS[number](held, a % len(held), b % len(held))
        return torch.stack([torch.stack(held).sum(0), held[-1]])

    program = capture(Model(function).eval(), (X.clone(),))
    (found,) = program.callable()(X.clone())
    torch.testing.assert_close(found, function(X.clone()), rtol=0, atol=0)
