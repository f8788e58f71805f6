"""Regions in an exported graph: gradient mode and autocast wrappers become plain nodes again."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from regraft.ir.capture_error import CaptureError

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
#: Where the region's graph stands among the wrapper's arguments.
_REGION_AT = {_SET_GRAD: 1, _AUTOCAST: 4}


def must_decompose(module: fx.GraphModule) -> bool:
    """Whether the graph mutates tensors, or has an autocast region that is switched on: both need the slower way,
    ``run_decompositions``, which makes the graph functional and writes the casts out."""
    return any(_mutates(node) or _casts(node) for node in _all_nodes(module))


def inline_regions(module: fx.GraphModule) -> None:
    """Replace every gradient-mode region and switched off autocast region by its nodes, in place."""
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in _REGION_AT and not _casts(node):
                _inline(module, node)
                found = True
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()


def refuse_left_over(module: fx.GraphModule) -> None:
    """Raise ``CaptureError`` for control flow and other nodes that hold a graph of their own."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"the model contains {node.target} at {node.name}, and regraft compiles graphs without control flow; "
                "compile the parts around it, or use torch.compile(model, backend='regraft')"
            )


def complete_values(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Give every node its fake value where export left it out."""
    for node in graph.nodes:
        if "val" in node.meta or node.op == "output":
            continue
        node.meta["val"] = value_of(node, fake_mode) if node.op == "call_function" else None


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and bool(schema.is_mutable)


def _casts(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is _AUTOCAST and bool(node.args[2])


def value_of(node: fx.Node, fake_mode: FakeTensorMode) -> Any:
    """What a call gives for the fake values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    with fake_mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    place = _REGION_AT[node.target]  # type: ignore[index]
    holder = node.args[place]
    assert isinstance(holder, fx.Node) and isinstance(holder.target, str)
    region = module.get_submodule(holder.target)
    assert isinstance(region, fx.GraphModule)
    inputs = [source for source in region.graph.nodes if source.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(inputs, node.args[place + 1 :], strict=True))
    for name, child in region.named_children():  # a region inside the region keeps its graph
        module.add_submodule(_lift(module, name, region), child)
    with module.graph.inserting_before(node):
        results = module.graph.graph_copy(region.graph, values)
    for old in region.graph.nodes:
        if old.op not in ("placeholder", "output"):
            values[old].meta = dict(old.meta)
    _replace(module.graph, node, results)


def _lift(module: fx.GraphModule, name: str, region: fx.GraphModule) -> str:
    """A free name for the region's child ``name``; its ``get_attr`` nodes are renamed to match."""
    fresh, count = name, 0
    while hasattr(module, fresh):
        count += 1
        fresh = f"{name}_{count}"
    for node in region.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.target = fresh
    return fresh


def _replace(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(results, (tuple, list)):
            user.replace_all_uses_with(results[user.args[1]], propagate_meta=False)  # type: ignore[index]
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results, propagate_meta=False)
    graph.erase_node(node)
