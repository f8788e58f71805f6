"""What ``forward`` does beside computing: attributes that it sets, strides that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import CaptureError, capture
from regraft.ir.capture_state import ModelState

X = torch.ones(2, 4)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Logs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.log = []

    def forward(self, x: Tensor) -> Tensor:
        self.inner.log.append(1)
        return x + len(self.inner.log)


class Notes(nn.Module):
    """Sets the same at each call, and begins in another state."""

    def __init__(self) -> None:
        super().__init__()
        self.width: Any = None
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        self.width = x.shape[0]
        first, self.ready = not self.ready, True
        return x * 2 if first else x * 3


@pytest.mark.parametrize(("model", "name"), [(Counts(), "calls"), (Logs(), "inner.log")])
def test_a_forward_that_counts_is_refused(model: nn.Module, name: str) -> None:
    with pytest.raises(CaptureError, match=rf"changes the attribute {name} at each call.*make it a buffer"):
        capture(model.eval(), (X,))


@pytest.mark.parametrize("change", [lambda held, x: held.append(x), lambda held, x: held[0].update(x=x)])
def test_a_forward_that_changes_what_it_is_given_is_refused(change: Callable[[Any, Tensor], None]) -> None:
    """Compiled code would leave the caller's list and dict as they are."""

    class Changes(nn.Module):
        def forward(self, x: Tensor, held: list[Any]) -> Tensor:
            change(held, x + 1)
            return x * 2

    with pytest.raises(CaptureError, match=r"changes a list, a dict or another container .* let it change a copy"):
        capture(Changes().eval(), (X, [{"x": X}]))


def test_a_forward_that_settles_is_captured_where_it_stays() -> None:
    model = Notes().eval()
    program = capture(model, (X,), dynamic=True)
    assert (model.width, model.ready) == (2, True)  # as one call leaves it, and no symbol
    assert torch.equal(program.callable()(torch.ones(5, 4))[0], torch.full((5, 4), 3.0))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_weak_references_to_weights_are_no_change(kind: type[nn.Module]) -> None:
    """A recurrent layer looks after its weights by a list of them, and tensors cannot be compared for a yes or no."""
    model = kind(4, 4)
    program = capture(model.eval(), (X[None],))
    torch.testing.assert_close(program.callable()(X[None])[0], model(X[None])[0])
    assert ModelState(model).changes() == []


def test_attributes_are_put_back() -> None:
    model = Logs()
    model.size = (1, 2)
    state = ModelState(model)
    model(X)
    model.size = (1, 3)
    model.extra = 1
    assert state.changes() == ["extra", "size", "inner.log"]
    state.restore()
    assert model.inner.log == [] and model.size == (1, 2) and not hasattr(model, "extra")
    assert state.changes() == []


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.is_contiguous() else x * 3


def test_a_model_that_asks_for_strides_says_so() -> None:
    assert capture(Asks().eval(), (X,)).reads_layout
    assert capture(Asks().eval(), (X,)).copy().reads_layout
    assert not capture(nn.Linear(4, 4).eval(), (X,)).reads_layout
    graph = torch.fx.Graph()
    graph.output(graph.call_method("stride", (graph.placeholder("x"), 0)))
    assert capture(torch.fx.GraphModule(nn.Module(), graph), (X,)).reads_layout


def test_layouts_that_are_not_dense_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"layout torch.sparse_coo.*to_dense"):
        capture(nn.Linear(4, 4).eval(), (X.to_sparse(),))


def test_a_specification_of_sizes_that_does_not_fit_is_named() -> None:
    with pytest.raises(CaptureError, match=r"with the symbolic sizes that dynamic asks for .*leave dynamic out"):
        capture(nn.Linear(4, 4).eval(), (X,), dynamic={"y": {0: torch.export.Dim("rows")}})
