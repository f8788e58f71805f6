"""Which value of a tensor a node reads, in graphs with in-place operators (the training IR keeps them).

Tensors which may share storage form a group. A group without a write is plain. A read after a write sees the
written value; it is known only where the tensor read is the one written to
(``zeros(...).masked_fill_(...)``), otherwise (a write through a view, say) it is unknown and the reader has
to be opaque.
"""

from __future__ import annotations

import torch
import torch.fx
from torch.fx import Node


def _schema_arguments(node: Node) -> list[tuple[Node, bool, bool]]:
    """The tensor arguments of a call: (argument, the output may alias it, it is written)."""
    if node.op == "call_method":
        writes = isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__")
        return [(item, True, writes and item is node.args[0]) for item in node.all_input_nodes]
    if not isinstance(node.target, torch._ops.OpOverload):
        # operator.getitem and unknown Python functions: the output may be a view of any input.
        return [(item, True, False) for item in node.all_input_nodes]
    found: list[tuple[Node, bool, bool]] = []
    schema = node.target._schema
    returned = any(output.alias_info is not None for output in schema.returns)
    for position, argument in enumerate(schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        nodes: list[Node] = []
        torch.fx.map_arg(value, nodes.append)
        alias = argument.alias_info
        found += [(item, returned and alias is not None, alias is not None and alias.is_write) for item in nodes]
    return found


class Mutations:
    """The writes of one graph; ``reads(reader, tensor)`` is the node whose value at definition the reader
    sees."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._position: dict[Node, int] = {}
        self._group: dict[Node, Node] = {}
        self._writes: dict[Node, list[tuple[Node, Node]]] = {}
        calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
        arguments = {node: _schema_arguments(node) for node in calls}
        if not any(written for found in arguments.values() for _, _, written in found):
            return
        self._position = {node: position for position, node in enumerate(graph.nodes)}
        for node in calls:
            for item, aliased, _ in arguments[node]:
                if aliased:
                    self._group[self._root(node)] = self._root(item)
        for node in calls:
            for item, _, written in arguments[node]:
                if written:
                    self._writes.setdefault(self._root(item), []).append((node, item))

    def _root(self, node: Node) -> Node:
        path = []
        while node in self._group and self._group[node] is not node:
            path.append(node)
            node = self._group[node]
        for passed in path:
            self._group[passed] = node
        return node

    def written(self, node: Node) -> bool:
        """Whether the storage of ``node`` is written somewhere in the graph."""
        return bool(self._writes) and self._root(node) in self._writes

    def reads(self, reader: Node | None, tensor: Node) -> Node | None:
        """The node which defines what ``reader`` (None: the end of the graph) sees in ``tensor``; None:
        unknown."""
        if not self.written(tensor):
            return tensor
        end = len(self._position) if reader is None else self._position[reader]
        start = self._position[tensor]
        seen: Node = tensor
        whole = {tensor}
        for write, target in self._writes[self._root(tensor)]:
            if not start < self._position[write] < end:
                continue
            if target not in whole:
                return None
            seen = write
            whole.add(write)
        return seen
