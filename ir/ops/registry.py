"""The registry of semantic operators: what regraft's own nodes mean and cost.

Each operator has a file of its own beside this one: schema, fake kernel, reference (plain PyTorch: the definition, the
CPU fallback and the oracle of tests) and cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import concrete


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, and bytes that must move through memory at least."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class SemanticOperator:
    """A registered operator; ``kind`` is the word that reports count it under."""

    kind: str
    overload: Any
    cost: Callable[[fx.Node], Cost]
    reference: Callable[..., Any]


#: OpOverload -> semantic operator. Filled by the operator files when ``regraft.ir.ops`` is imported.
OPERATORS: dict[Any, SemanticOperator] = {}


def register(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[[fx.Node], Cost],
) -> Any:
    """Define ``regraft::name`` and enter it; returns its default overload.

    ``reference`` and ``fake`` get every argument of the schema by its name, with the schema's defaults filled in: a
    definition need not repeat these, and a fake kernel names what it needs.
    """
    definition = torch.library.custom_op(
        f"regraft::{name}", _by_name(reference, name, schema), mutates_args=(), schema=schema
    )
    definition.register_fake(_by_name(fake, name, schema))
    overload = definition._opoverload
    OPERATORS[overload] = SemanticOperator(name, overload, cost, reference)
    return overload


def _by_name(function: Callable[..., Any], name: str, schema: str) -> Callable[..., Any]:
    """The function as a call of the operator makes it: places become names, and what is left out is as by default."""
    expected = torch._C.parse_schema(f"regraft::{name}{schema}").arguments
    names = [argument.name for argument in expected]
    defaults = {argument.name: argument.default_value for argument in expected if argument.has_default_value()}

    def call(*args: Any, **options: Any) -> Any:
        return function(**{**defaults, **dict(zip(names, args, strict=False)), **options})

    return call


def tensor_bytes(value: Any) -> float:
    """Bytes of every tensor in a node's fake value; symbolic sizes count as in the example."""
    if isinstance(value, torch.Tensor):
        return float(math.prod(concrete(size) for size in value.shape) * value.element_size())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    return 0.0


def elements(value: torch.Tensor) -> float:
    """Number of elements of a fake tensor; symbolic sizes count as in the example."""
    return float(math.prod(concrete(size) for size in value.shape))


def traffic(node: fx.Node) -> float:
    """Bytes of a call that reads each of its inputs once and writes its outputs once."""
    return sum(tensor_bytes(source.meta.get("val")) for source in node.all_input_nodes) + tensor_bytes(
        node.meta.get("val")
    )


def elementwise(flops_per_element: float) -> Callable[[fx.Node], Cost]:
    """Cost of an operator that does a fixed number of operations for each output element."""

    def cost(node: fx.Node) -> Cost:
        value = node.meta["val"]
        first = value if isinstance(value, torch.Tensor) else value[0]
        return Cost(flops_per_element * elements(first), traffic(node))

    return cost
