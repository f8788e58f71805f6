"""An operand that the router combines with its scores, permuted along the expert axis: bias, correction, constants.

What it is made of decides: a weight is permuted by a weight operation, a pointwise function of such is computed of
permuted ones, what is the same for every expert stays. A value that is computed from the tokens is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import FILLED_LIKE, Builder, arguments, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.pointwise import is_pointwise
from regraft.ir.program import Program
from regraft.ir.weights import WeightOp
from regraft.passes.experts.permutation import Permutation
from regraft.passes.refused import Refused

aten = torch.ops.aten
#: Builds the permuted operand in front of where it is read.
Recipe = Callable[[Builder], fx.Node]

_UNIFORM = frozenset(
    (
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        *FILLED_LIKE,
        aten.scalar_tensor.default,
    )
)
#: Calls that only move or add dims, with the tensor they are of.
_MOVES = (aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.permute.default)


def is_uniform(node: fx.Node, dim: int) -> bool:
    """Whether all entries of ``node`` along ``dim`` (from the end) are known to be equal."""
    if -dim > rank(node) or size_equal(shape(node)[dim], 1) or is_call(node, _UNIFORM):
        return True
    if is_pointwise(node):
        return all(is_uniform(operand, dim) for operand in node.all_input_nodes if is_tensor(operand))
    if is_call(node, (aten.repeat_interleave.self_int, *_MOVES)):
        source: Any = arguments(node)["self"]
        at = _same_axis(node, source, dim)
        return at is not None and is_uniform(source, at)
    return False


@dataclass(frozen=True)
class Operands:
    """Operands of one program, permuted."""

    program: Program

    def along(self, node: fx.Node, dim: int, order: Permutation) -> Recipe:
        """``node.index_select(dim, order)``, ``dim`` from the end. Raises ``Refused``."""
        if is_uniform(node, dim):
            return lambda build: node
        name = self.program.weight_name(node)
        if name is not None:
            return self._weight(name, rank(node) + dim, order)
        if is_pointwise(node):
            return self._pointwise(node, dim, order)
        if is_call(node, _MOVES):
            return self._moved(node, dim, order)
        raise Refused("the router reads a value for each expert that is computed at run time", node)

    def _weight(self, name: str, dim: int, order: Permutation) -> Recipe:
        op = WeightOp("index", (name,), {"dim": dim, "indices": list(order.order)})
        return lambda build: self.program.derive_weight(f"{name}.permuted", op)

    def _pointwise(self, node: fx.Node, dim: int, order: Permutation) -> Recipe:
        recipes = {operand: self.along(operand, dim, order) for operand in node.all_input_nodes if is_tensor(operand)}
        return lambda build: _rebuilt(build, node, {operand: make(build) for operand, make in recipes.items()})

    def _moved(self, node: fx.Node, dim: int, order: Permutation) -> Recipe:
        """Where the axis only changes its place among the dims."""
        source: Any = arguments(node)["self"]
        at = _same_axis(node, source, dim)
        if at is None:
            raise Refused("the router reads a value for each expert that is reshaped at run time", node)
        make = self.along(source, at, order)
        return lambda build: _rebuilt(build, node, {source: make(build)})


def _same_axis(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """The dim of ``source`` that becomes ``dim`` of ``node``, both from the end."""
    if is_call(node, (aten.expand.default, aten.repeat_interleave.self_int)):
        return dim
    if is_call(node, (aten.permute.default,)):
        return int(arguments(node)["dims"][dim]) % rank(source) - rank(source)
    size, inner = shape(node)[dim], _elements(shape(node)[rank(node) + dim + 1 :])
    for at in range(-rank(source), 0) if inner is not None else ():
        if shape(source)[at] == size and _elements(shape(source)[rank(source) + at + 1 :]) == inner:
            return at
    return None


def _elements(sizes: tuple[Any, ...]) -> int | None:
    total = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        total *= size
    return total


def _rebuilt(build: Builder, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda given: new.get(given, given))
    return build.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
