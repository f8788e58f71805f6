"""What a caller writes to an output reaches what it reaches in the original, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from tests.support import AsModule

X = torch.arange(32.0).reshape(4, 8) / 7


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        return x * self.table, self.table.clone(), self.table * 2


class Swap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(8))
        self.register_buffer("b", torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        kept = self.a.clone()
        self.a.copy_(self.b)
        self.b.copy_(kept)
        return x + self.a, kept


def reach(call: Callable[..., Any]) -> list[tuple[bool, ...]]:
    """For each output: which of the inputs and outputs a write to it changes."""
    x = X.clone()
    values = [x, *call(x)]
    found = []
    for output in values[1:]:
        before = [value.clone() for value in values]
        output.detach().add_(100)
        found.append(tuple(not torch.equal(a, b) for a, b in zip(values, before, strict=True)))
    return found


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "a copy": lambda x: (x.clone(), x + 0, x),
    "equal values": lambda x: (x * 2, x * 2, torch.relu(x), torch.relu(x)),
    "views": lambda x: (x.t(), x[0], *(x * 2).chunk(2, -1)),
    "constants": lambda x: (x * 2, torch.ones(3), torch.ones(3)[1:]),
    "expanded": lambda x: (x.sum(0, keepdim=True).expand(4, 8).clone(),),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_writes_reach_what_they_reach_in_the_original(name: str, tmp_path: Path) -> None:
    model = AsModule(FUNCTIONS[name]).eval()
    fast = regraft.compile(model, X)
    fast.save(tmp_path / "m.regraft")
    expected = [value.clone() for value in model(X)]
    for candidate in (fast, regraft.load(tmp_path / "m.regraft")):
        assert reach(candidate) == reach(model)
        for value, wanted in zip(candidate(X), expected, strict=True):
            assert torch.equal(value, wanted)


def test_compiled_code_keeps_its_own_weights() -> None:
    fast = regraft.compile(Weights().eval(), X)
    expected = [value.clone() for value in fast(X)]
    for value in fast(X):
        value.zero_()
    assert all(torch.equal(a, b) for a, b in zip(fast(X), expected, strict=True))


def test_buffers_that_change_places() -> None:
    model, reference = Swap().eval(), Swap().eval()
    fast = regraft.compile(model, X)
    for _ in range(3):
        for value, wanted in zip(fast(X), reference(X), strict=True):
            assert torch.equal(value, wanted)
    assert torch.equal(model.a, reference.a) and torch.equal(model.b, reference.b)


def test_the_old_value_of_an_input_that_is_written() -> None:
    def forward(x: Tensor, y: Tensor) -> Any:
        old = x.clone()
        x.copy_(y)
        y.copy_(old)
        return old.view(-1), x + 1

    model = AsModule(forward).eval()
    fast = regraft.compile(model, (X, X * 3))
    given, reference = (X.clone(), X * 3), (X.clone(), X * 3)
    for value, wanted in zip((*fast(*given), *given), (*model(*reference), *reference), strict=True):
        assert torch.equal(value, wanted)


def test_inputs_that_are_written_and_overlap_run_the_original() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x + y

    fast = regraft.compile(AsModule(forward).eval(), (X.clone(), X.clone()))
    same = X.clone()
    assert torch.equal(fast(same, same), 2 * (X + 1)) and torch.equal(same, X + 1)
    assert ["shares memory" in event.reason for event in fast.report.events] == [True]


class Heads(nn.Module):
    """Two layers that are merged into one, whose parts are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        return self.first(x), self.second(x), self.second(x).transpose(0, 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_output_that_is_contiguous_stays_it(dynamic: bool) -> None:
    model = Heads().eval()
    fast = regraft.compile(model, (X,), dynamic=dynamic)
    with torch.no_grad():
        outputs, wanted = fast(X), model(X)
    assert [output.is_contiguous() for output in outputs] == [value.is_contiguous() for value in wanted]
    for output, value in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, value)
    assert outputs[0].view(-1).shape == (16,)
