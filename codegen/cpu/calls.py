"""From the lowered graph to a Python function that costs little to call.

The graph names operators as overloads, which say exactly what runs, and weights as attributes. Called like that, each
operator costs one to two microseconds more than PyTorch's own binding of it, and each weight half a microsecond:
a tenth of a small model's time. So what runs is a copy of the graph with bindings, weights as bound arguments, and
neighbouring native calls as one (``segments.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from regraft.codegen.cpu.masks_first import masks_first
from regraft.codegen.cpu.native_operators import DESCRIPTIONS
from regraft.codegen.cpu.segments import Segment, group

aten = torch.ops.aten

#: Operator overload -> PyTorch's own binding of it: same arguments, same result.
BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.as_strided.default: torch.as_strided,
    aten.reshape.default: torch.reshape,
    aten.permute.default: torch.permute,
    aten.layer_norm.default: torch.layer_norm,
    aten.embedding.default: torch.embedding,
    aten.linear.default: torch._C._nn.linear,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.addmm_.default: torch.Tensor.addmm_,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.Tensor.mul_,
    aten.relu_.default: torch.relu_,
    aten.sigmoid_.default: torch.sigmoid_,
    aten.tanh_.default: torch.tanh_,
    aten.silu_.default: torch._C._nn.silu_,
    aten.gelu_.default: torch._C._nn.gelu_,  # type: ignore[attr-defined]  # the stubs lack it
}


def function_of(module: fx.GraphModule) -> Callable[..., Any]:
    """A function of the graph's inputs that does what ``module`` does. It reads the attributes that ``module`` has
    now; tensors are shared, not copied."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    bound: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            made[node] = graph.placeholder(node.name)
            bound[made[node]] = _attribute(module, str(node.target))
    for node in module.graph.nodes:
        if node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)

    def bind(segment: Segment) -> fx.Node:
        with graph.inserting_before(next(iter(graph.nodes))):
            place = graph.placeholder(f"segment_{len(bound)}")
        bound[place] = segment
        return place

    masks_first(graph, DESCRIPTIONS)
    group(graph, dict(bound), bind)
    for node in list(graph.nodes):
        node.target = BINDINGS.get(node.target, node.target)
        if node in bound and not node.users:
            graph.erase_node(node)
    values = [bound[node] for node in graph.nodes if node in bound]
    return partial(fx.GraphModule(nn.Module(), graph).forward, *values)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
