"""Which primitive a call is, and what of its arguments the primitive takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from regraft.codegen.rowwise.primitives import pointwise

aten = torch.ops.aten


def call(target: Any, *args: Any, kind: torch.dtype = torch.float32, **options: Any) -> fx.Node:
    """A call of an operator; ``"x"`` and ``"y"`` are tensors of its element type."""
    graph = fx.Graph()
    named = {name: graph.placeholder(name) for name in "xy"}
    node = graph.call_function(target, tuple(named.get(arg, arg) for arg in args), options)
    for one in graph.nodes:
        one.meta["val"] = torch.zeros(3, 8, dtype=kind)
    return node


#: A call -> the primitive and its operands.
CALLS: dict[str, tuple[fx.Node, str, list[object]]] = {
    "a sum": (call(aten.add.Tensor, "x", "y"), "add", ["x", "y"]),
    "a scaled sum": (call(aten.add.Tensor, "x", "y", alpha=2), "add_scaled", ["x", "y", 2]),
    "a root": (call(aten.pow.Tensor_Scalar, "x", 0.5), "sqrt", ["x"]),
    "a lower bound": (call(aten.clamp.default, "x", 0.5), "maximum", ["x", 0.5]),
    "two bounds": (call(aten.hardtanh.default, "x"), "clamp", ["x", -1, 1]),
    "an approximation": (call(aten.gelu.default, "x", approximate="tanh"), "gelu_tanh", ["x"]),
    "a cast": (call(aten.to.dtype, "x", torch.float16), "same", ["x"]),
    "a turned bit": (call(aten.bitwise_not.default, "x", kind=torch.int32), "bitwise_not", ["x"]),
    "a turned truth": (call(aten.bitwise_not.default, "x", kind=torch.bool), "logical_not", ["x"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_a_primitive_of_its_operands(name: str) -> None:
    node, primitive, operands = CALLS[name]
    found = pointwise(node)
    assert found is not None
    assert (found[0].name, [o.name if isinstance(o, fx.Node) else o for o in found[1]]) == (primitive, operands)


def test_what_rounds_to_whole_numbers_or_is_a_power_without_products_is_none() -> None:
    assert pointwise(call(aten.div.Tensor_mode, "x", "y", rounding_mode="floor")) is None
    assert pointwise(call(aten.pow.Tensor_Scalar, "x", 2.5)) is None
