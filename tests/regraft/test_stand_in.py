"""A compiled module in the place of its model: copied, pickled, held by another module, attributes set."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.errors import InputError
from regraft.gate import gate_of

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4).eval()


def test_a_copy_has_a_model_of_its_own() -> None:
    fast = regraft.compile(linear(), X)
    twin = copy.deepcopy(fast)
    expected = fast(X)
    with torch.no_grad():
        fast.weight.zero_()
    torch.testing.assert_close(twin(X), expected)  # bits may differ: the copy may have chosen another kernel
    assert not torch.allclose(fast(X), expected)


def test_a_copy_of_a_loaded_model_has_buffers_of_its_own(tmp_path: Path) -> None:
    regraft.compile(Counter().eval(), X).save(tmp_path / "m.regraft")
    loaded = regraft.load(tmp_path / "m.regraft")
    loaded(X)
    twin = copy.deepcopy(loaded)
    assert torch.equal(twin(X), 2 * X) and torch.equal(loaded(X), 2 * X)


def test_a_freed_model_is_not_copied_and_none_is_pickled() -> None:
    with pytest.raises(InputError, match="freed"):
        copy.deepcopy(regraft.compile(linear(), X, free_original=True))
    with pytest.raises(TypeError, match=r"cannot be pickled; write it with its method save\(\)"):
        pickle.dumps(regraft.compile(linear(), X))


def test_attributes_are_set_on_the_model() -> None:
    model = linear()
    fast = regraft.compile(model, X)
    fast.note = "here"
    fast.bias = None
    assert model.note == "here" and model.bias is None
    torch.testing.assert_close(fast(X), model(X).detach())


def test_a_module_that_holds_one_loads_its_state() -> None:
    parent = nn.Sequential(regraft.compile(linear(), X), nn.Linear(4, 2)).eval()
    state = {name: value * 2 for name, value in parent.state_dict().items()}
    assert parent.load_state_dict(state).missing_keys == []
    assert torch.equal(parent[0].original.weight, state["0.weight"])
    torch.testing.assert_close(parent[0](X), parent[0].original(X))
    missing = parent.load_state_dict({"1.weight": state["1.weight"]}, strict=False).missing_keys
    assert sorted(missing) == ["0.bias", "0.weight", "1.bias"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        parent.load_state_dict({**state, "0.weight": torch.ones(1)})


def test_strides_are_part_of_what_a_model_that_asks_for_them_was_built_for(tmp_path: Path) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.is_contiguous() else x * 3

    fast = regraft.compile(Asks().eval(), X)
    across = X.t().contiguous().t()
    assert torch.equal(fast(X), X * 2) and torch.equal(fast(across), X * 3) and torch.equal(fast(X), X * 2)
    assert len(fast.entries) == 2
    one = regraft.compile(Asks().eval(), across)
    one.save(tmp_path / "m.regraft")
    loaded = regraft.load(tmp_path / "m.regraft")
    assert torch.equal(loaded(across), X * 3)
    with pytest.raises(InputError, match="no code for inputs"):
        loaded(X)


def test_threads_that_meet_new_shapes_at_once() -> None:
    model, reference = linear(), linear()
    fast = regraft.compile(model)
    failures: list[str] = []

    def work() -> None:
        for rows in range(1, 11):
            x = torch.full((rows, 4), 0.5)
            try:
                torch.testing.assert_close(fast(x), reference(x).detach())
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(fast.entries) == 8


def test_a_model_that_another_thread_runs_is_not_captured() -> None:
    gate = gate_of(linear())
    inside, leave, found = threading.Event(), threading.Event(), []

    def run() -> None:
        with gate.running():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    with gate.capturing() as alone:
        found.append(alone)
    leave.set()
    thread.join()
    with gate.running(), gate.capturing() as alone, gate.capturing() as again:
        found += [alone, again]
    assert found == [False, True, True]


def test_mutated_state_survives_threads() -> None:
    fast = regraft.compile(Counter().eval(), X)
    threads = [threading.Thread(target=lambda: [fast(X) for _ in range(50)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fast.calls.item() == 150


def test_a_report_of_sizes_that_depend_on_data() -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum() + x.nonzero().shape[0]

    fast = regraft.compile(Nonzero().eval(), X)
    assert fast(X) == Nonzero()(X) and fast.report.operators_before
