"""The Dynamo backend: the same numbers across graph breaks, shapes, weights and modes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from regraft.dynamo import backend
from regraft.errors import OptionError


class Block(nn.Module):
    """Parameters, buffers, a graph break, and a size in the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(self.norm(self.linear(x)))
        torch._dynamo.graph_break()
        return y * x.shape[0]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_layers_of_one_class_shapes_and_graph_breaks() -> None:
    model = nn.Sequential(Block(), Block()).eval()
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        for rows in (2, 3, 4):
            x = torch.randn(rows, 4)
            assert torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_changed_weights_are_seen() -> None:
    model, x = Block().eval(), torch.randn(2, 4)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        fast(x)
        model.linear.weight.mul_(2)
        assert torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_gradients_flow_because_the_graph_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    fast = torch.compile(model, backend=backend)
    with caplog.at_level(logging.WARNING, "regraft"):
        fast(x).sum().backward()
    assert model.weight.grad is not None and "torch.no_grad()" in caplog.text


def test_options() -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend=backend, options={"verify": "off"})(x), model(x), atol=1e-6)
    with pytest.raises(OptionError, match="the backend knows verify"):
        backend(torch.fx.symbolic_trace(model), [x], options={"speed": 11})


def test_a_mode_is_for_another_backend() -> None:
    with pytest.raises(Exception, match=r"mode='max-autotune' was given, which belongs to Inductor"):
        torch.compile(nn.Linear(4, 4).eval(), backend="regraft", mode="max-autotune")(torch.ones(2, 4))
