"""Telling whether a check is the same computation as one that was made before, other parameters aside.

A model repeats its layers, and a rewrite of one is the rewrite of all: the same operators with the same arguments on
values of the same shapes, drawn from the same places of the pool. Only the parameters differ. Such a repetition is
not computed again; the comparison of the whole model with the original covers it, and where that fails the compiler
starts anew and computes every check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import concrete, is_tensor
from regraft.ir.program import Program

Leaf = Callable[[fx.Node], Hashable | None]


class Unrepeatable(Exception):
    """A check that depends on something this module has no name for: it is computed."""


class Signature:
    """What one check computes, as a value: equal for checks that differ in the values of parameters alone.

    ``leaf`` names a node at which evaluation stops (a random activation, a size); None for one that is computed.
    """

    def __init__(self, program: Program, leaf: Leaf) -> None:
        self._program = program
        self._leaf = leaf
        self._weights: dict[int, int] = {}  # a weight is known by when it was first met: tied ones are met again
        self._places: dict[fx.Node, int] = {}
        self._inputs = {node: place for place, node in enumerate(program.user_inputs())}

    def of(self, order: Sequence[fx.Node], wanted: Iterable[fx.Node]) -> Hashable:
        """The signature of computing ``wanted`` by evaluating ``order``; raises ``Unrepeatable``."""
        parts = []
        for node in order:
            parts.append(self._node(node))
            self._places[node] = len(self._places)
        return tuple(parts), tuple(self._places[node] for node in wanted)

    def _node(self, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            return self._placeholder(node)
        leaf = self._leaf(node)
        if leaf is not None:
            return "leaf", leaf, layout(node)
        return node.target, self._freeze(node.args), self._freeze(node.kwargs)

    def _placeholder(self, node: fx.Node) -> Hashable:
        if node in self._inputs:
            return "input", self._inputs[node]
        name = self._program.weight_name(node)
        if name is None:
            raise Unrepeatable(node.name)
        return self._weight(name)

    def _weight(self, name: str) -> Hashable:
        store = self._program.weights
        made = store.derived.get(name)
        if made is not None:
            return made.op, self._freeze(made.options), tuple(self._weight(part) for part in made.inputs)
        tensor = store.originals[name].detach()
        if name not in self._program.parameters():
            return "constant", tuple(tensor.shape), str(tensor.dtype), _digest(tensor)
        place = self._weights.setdefault(id(store.originals[name]), len(self._weights))
        return "parameter", place, tuple(tensor.shape), tensor.stride(), str(tensor.dtype), _uniform(tensor)

    def _freeze(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return "node", self._places[value]
        if isinstance(value, (list, tuple)):
            return tuple(map(self._freeze, value))
        if isinstance(value, dict):
            return tuple((key, self._freeze(item)) for key, item in value.items())
        if isinstance(value, slice):
            return "slice", *map(self._freeze, (value.start, value.stop, value.step))
        if isinstance(value, (bool, int, float, complex)):
            return type(value), value  # 1, 1.0 and True are equal, and not the same argument
        if value is None or isinstance(value, (str, torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return value
        raise Unrepeatable(f"an argument of type {type(value).__name__}")


def layout(node: fx.Node) -> Hashable:
    """Shape, strides, element type and device of a node's value; of a number, the number."""
    if not is_tensor(node):
        return concrete(node)
    fake = node.meta["val"]
    return tuple(map(concrete, fake.shape)), tuple(map(concrete, fake.stride())), fake.dtype, fake.device


def _digest(tensor: Tensor) -> bytes:
    """The values of a buffer or constant: rules prove facts from them."""
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data, digest_size=16).digest()


def _uniform(tensor: Tensor) -> Hashable:
    """The value that the first row of a parameter holds throughout, None where there are several: a norm's weight of
    ones or a bias of zeros hides a rewrite that loses it."""
    if tensor.numel() == 0:
        return None
    while tensor.dim() > 1:
        tensor = tensor[0]
    first = tensor.reshape(-1)[0]
    return first.item() if bool((tensor == first).all()) else None
