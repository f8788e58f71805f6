"""A model that changes after it was compiled is noticed, whatever it is that changes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.watch import WeightWatch

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.drop = nn.Dropout()
        self.factor, self.table = 2.0, torch.ones(4)
        self.config = SimpleNamespace(shift=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.first(x)) * self.factor + self.config.shift * self.table


def _hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda model: setattr(model, "factor", 3.0),
    "a tensor": lambda model: setattr(model, "table", torch.zeros(4)),
    "a tensor in place": lambda model: model.table.mul_(5),
    "a configuration": lambda model: setattr(model.config, "shift", 7.0),
    "a part": lambda model: setattr(model, "first", nn.Linear(4, 4)),
    "a hook": lambda model: model.first.register_forward_hook(_hook),
    "data in place": lambda model: model.first.weight.data.mul_(2),
    "data replaced": lambda model: setattr(model.first.weight, "data", torch.ones(4, 4)),
    "a weight": lambda model: setattr(model.first, "bias", None),
    "forward": lambda model: setattr(model.first, "forward", lambda x: x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_leads_to_new_code(name: str) -> None:
    model = Model().eval()
    fast = regraft.compile(model, X)
    before = fast(X)
    with torch.no_grad():
        CHANGES[name](model)
        expected = model(X)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(fast(X), expected)
    assert [event.kind for event in fast.report.events] == ["relowering"] and len(fast.entries) == 1


def test_weights_without_versions_are_watched() -> None:
    with torch.inference_mode():
        model = Model().eval()
        fast = regraft.compile(model, X)
        model.first.weight.mul_(3)
        torch.testing.assert_close(fast(X), model(X))


def test_a_part_in_training_mode_runs_the_original_until_it_is_back() -> None:
    model = Model().eval()
    fast = regraft.compile(model, X)
    expected = fast(X)
    model.drop.train()
    assert (fast(X) != expected).any() and fast.entries == []
    model.drop.eval()
    torch.testing.assert_close(fast(X), expected)
    assert len(fast.entries) == 1


def test_a_model_that_changes_at_every_call_is_left_alone_until_it_rests() -> None:
    model = Model().eval()
    fast = regraft.compile(model, X)
    for step in range(20):
        model.factor = float(step)
        torch.testing.assert_close(fast(X), model(X).detach())
    assert fast.entries == [] and "nearly every call" in fast.report.events[-1].reason
    for _ in range(2):
        torch.testing.assert_close(fast(X), model(X).detach())
    assert len(fast.entries) == 1


def test_a_watch_over_odd_tensors() -> None:
    values = [
        torch.full((3,), float("nan")),
        torch.zeros(0),
        torch.tensor(True),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.bfloat16).t(),
        torch.ones(3).to_sparse(),
    ]
    watch = WeightWatch(None, values)
    assert watch.changed() == ""
    values[2].fill_(False)
    assert watch.changed() == "a weight was changed in place"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(5, 7),
        torch.zeros(3, 4, dtype=torch.bfloat16).t(),
        torch.zeros(6, dtype=torch.float64)[1::2],
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(4, dtype=torch.complex64).conj().imag,
        torch.frombuffer(bytearray(13), dtype=torch.float32, count=3, offset=1),  # where no number usually lies
    ],
)
def test_what_is_written_behind_a_version_s_back_is_seen(tensor: Tensor) -> None:
    watch = WeightWatch(None, [torch.ones(2), tensor])
    assert watch.changed() == ""
    tensor.data.add_(1)
    assert watch.changed() == "a weight's data was changed in place"


def test_tables_that_every_module_has_are_no_configurations() -> None:
    watch = WeightWatch(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert len(watch._attributes) == 3  # one a part


def test_what_torch_compile_writes_on_a_module_is_no_change() -> None:
    model = Model().eval()
    watch = WeightWatch(model)
    torch.compile(model, backend="eager")(X)
    assert watch.changed() == ""
    model.added = 1
    assert watch.changed() == "the model's attribute 'added' was changed"
