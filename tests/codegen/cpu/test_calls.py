"""What runs is the lowered graph, called cheaply: bindings instead of overloads, weights as bound arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.codegen.cpu.calls import BINDINGS, function_of

X = torch.linspace(-2, 2, 12).reshape(3, 4)
W = torch.linspace(-1, 1, 16).reshape(4, 4)
ARGUMENTS = {
    "aten::as_strided": (X, [2, 3], [4, 1], 1),
    "aten::reshape": (X, [2, 6]),
    "aten::permute": (X, [1, 0]),
    "aten::layer_norm": (X, [4], W[0], W[1], 1e-5),
    "aten::embedding": (W, torch.tensor([3, 1]), 0),
    "aten::linear": (X, W, W[0]),
    "aten::mm": (X, W),
    "aten::addmm": (X, X, W),
    "aten::addmm_": (X, X, W),
}


@pytest.mark.parametrize("target", BINDINGS, ids=str)
def test_a_binding_does_what_its_overload_does(target: torch._ops.OpOverload) -> None:
    binary = target._overloadname == "Tensor"
    given = ARGUMENTS.get(target._schema.name, (X, X.flip(0)) if binary else (X,))
    fresh = [[value.clone() if isinstance(value, Tensor) else value for value in given] for _ in range(2)]
    assert torch.equal(BINDINGS[target](*fresh[0]), target(*fresh[1]))
    assert all(torch.equal(a, b) for a, b in zip(*fresh, strict=True) if isinstance(a, Tensor))


def test_the_function_reads_attributes_in_place() -> None:
    """A buffer that the model mutates is read anew at each call."""
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("state", torch.zeros(3, 4))
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, graph.get_attr("state"))),))
    module = fx.GraphModule(root, graph)
    run = function_of(module)
    assert torch.equal(run(X)[0], X)
    module.state.add_(1.0)  # type: ignore[operator, union-attr]
    assert torch.equal(run(X)[0], X + 1)


def test_no_known_overload_is_left() -> None:
    graph = fx.Graph()
    out = graph.placeholder("x")
    for target in (torch.ops.aten.relu_.default, torch.ops.aten.neg.default):
        out = graph.call_function(target, (out,))
    graph.output(out)
    run = function_of(fx.GraphModule(nn.Module(), graph))
    code = run.func.__self__.code  # type: ignore[attr-defined]
    assert "aten.relu_" not in code and "aten.neg.default" in code
