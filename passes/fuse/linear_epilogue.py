"""What follows a linear layer joins it: an activation, a residual, the product with a gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, shape, sizes_equal
from regraft.ir.ops.activation import activation_name
from regraft.ir.pattern import Call, add
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need

aten = torch.ops.aten
_ACTIVATIONS = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
)


def _arguments_of(node: Any) -> dict[str, Any]:
    """Arguments of either spelling of a linear layer, as those of the operator with epilogues."""
    given = arguments(node)
    if node.target is aten.linear.default:
        return {"x": given["input"], "weight": given["weight"], "bias": given["bias"]}
    return given


def _rebuild(build: Builder, node: Any, **changes: Any) -> fx.Node:
    return build.call(ops.linear, **{**_arguments_of(node), **changes})


class _Activated(torch.nn.Module):
    """A linear layer and its activation."""

    def __init__(self, activation: torch.nn.Module, shared: bool = False) -> None:
        super().__init__()
        self.linear, self.activation, self.shared = torch.nn.Linear(8, 4), activation, shared

    def forward(self, x: torch.Tensor) -> Any:
        product = self.linear(x)
        return (self.activation(product), product) if self.shared else self.activation(product)


class _Residual(torch.nn.Module):
    """A linear layer on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.linear(x)
        return out


def _example(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda: (model, (torch.randn(2, 3, 8, generator=generator),))


class LinearActivation(Rule):
    """activation(linear(x)) is one linear layer with an epilogue."""

    exactness = Exactness.REASSOCIATED

    def pattern(self) -> Any:
        product = Call((aten.linear.default,), loose=True, name="product")
        return Call(_ACTIVATIONS, (product,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.sole_user("product"), "the product is used without the activation", at=match.product)
        yield need(activation_name(match.root) is not None, "the activation has no name", at=match.root)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return _rebuild(build, match.product, activation=activation_name(match.root))

    examples = (
        Example("gelu", _example(_Activated(torch.nn.GELU()))),
        Example("tanh gelu", _example(_Activated(torch.nn.GELU(approximate="tanh")))),
        Example("relu", _example(_Activated(torch.nn.ReLU()))),
    )
    near_misses = (Example("the product is an output", _example(_Activated(torch.nn.ReLU(), True)), "used without"),)


class LinearResidual(Rule):
    """residual + linear(x) is one linear layer with an epilogue."""

    exactness = Exactness.REASSOCIATED

    def pattern(self, residual: Any) -> Any:
        product = Call((aten.linear.default, ops.linear), loose=True, name="product")
        return add(product, residual)

    def check(self, match: Match) -> Iterator[Requirement]:
        given = _arguments_of(match.product)
        yield need(match.sole_user("product"), "the product is used without the residual", at=match.product)
        yield need(match.residual is not match.product, "the product is added to itself", at=match.product)
        yield need(given.get("residual") is None, "the linear layer has a residual already", at=match.product)
        same = sizes_equal(shape(match.residual), shape(match.product))
        yield need(same, "what is added does not have the product's shape", at=match.residual)
        yield need(dtype(match.residual) == dtype(match.product), "the residual has another type", at=match.residual)
        yield need(match.weight_name(match.residual) is None, "what is added is a weight", at=match.residual)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return _rebuild(build, match.product, residual=match.residual)

    examples = (Example("a residual stream", _example(_Residual())),)
