"""A region's small graph as PyTorch statements: the definition that stands beside a kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.operators import interleave, product
from regraft.codegen.rowwise.primitives import operator_word
from regraft.ir.nodes import arguments

aten = torch.ops.aten

#: Operators as one writes them; ``{0}``… are the arguments in the schema's order.
_TEXTS = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.mul.Tensor: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.rsub.Scalar: "{1} - {0}",
    aten.pow.Tensor_Scalar: "{0}**{1}",
    aten.neg.default: "-{0}",
    aten.eq.Scalar: "{0} == {1}",
    aten.gt.Scalar: "{0} > {1}",
    aten.lt.Scalar: "{0} < {1}",
    aten.to.dtype: "{0}.to({1})",
    aten.mean.dim: "{0}.mean({1}, {2})",
    aten.sum.dim_IntList: "{0}.sum({1}, {2})",
    aten.amax.default: "{0}.amax({1}, {2})",
    aten.amin.default: "{0}.amin({1}, {2})",
    aten.squeeze.dims: "{0}.squeeze({1})",
    aten.unsqueeze.default: "{0}.unsqueeze({1})",
    aten.permute.default: "{0}.permute({1})",
    aten.expand.default: "{0}.expand({1})",
    aten.where.self: "torch.where({0}, {1}, {2})",
    aten.where.ScalarSelf: "torch.where({0}, {1}, {2})",
    aten.where.ScalarOther: "torch.where({0}, {1}, {2})",
    aten.cat.default: "torch.cat({0}, {1})",
    aten.gelu.default: "torch.nn.functional.gelu({0}, approximate={1})",
    interleave: "interleave({0}, {1})",
    product: "product({0}, {1})",
    **{
        getattr(aten, word).default: f"{{0}}.{word}()"
        for word in ("abs", "exp", "log", "sqrt", "rsqrt", "relu", "sigmoid", "tanh", "sin", "cos", "erf", "isnan")
    },
    aten.silu.default: "torch.nn.functional.silu({0})",
}
#: Options that change what such a text means; with another value the operator's own name is written.
_PLAIN = {"alpha": 1, "non_blocking": False, "copy": False, "memory_format": None, "implicit": False}


def reference_lines(graph: fx.Graph) -> list[str]:
    """A statement for each call, and the return of the results."""
    calls = {node.name: _call(node) for node in graph.nodes if node.op == "call_function"}
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    names = [str(result) for result in results]
    returned = calls.pop(names[0]) if len(names) == 1 and next(reversed(calls)) == names[0] else ", ".join(names)
    return [*(f"{name} = {text}" for name, text in calls.items()), f"return {returned}"]


def _call(node: fx.Node) -> str:
    if node.target is aten.slice.Tensor:
        given = arguments(node)
        if given["dim"] == -1:
            step = "" if given["step"] == 1 else f":{given['step']}"
            bounds = [given["start"] or "", "" if given["end"] is None else given["end"]]
            return f"{given['self']}[..., {bounds[0]}:{bounds[1]}{step}]"
    named = arguments(node)
    positions = [
        value for name, value in named.items() if name not in (*_PLAIN, "dtype") or (name == "dtype" and _casts(node))
    ]
    text = _TEXTS.get(node.target)
    odd = any(named.get(name, value) != value for name, value in _PLAIN.items())
    if text is not None and not odd and (named.get("dtype") is None or _casts(node)):
        return text.format(*map(_argument, positions))
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    listed = [*map(_argument, node.args), *(f"{name}={_argument(value)}" for name, value in node.kwargs.items())]
    return f"torch.ops.aten.{operator_word(target)}.{target._overloadname}({', '.join(listed)})"


def _casts(node: fx.Node) -> bool:
    return node.target is aten.to.dtype


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)
