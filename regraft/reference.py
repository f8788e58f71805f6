"""The original's own output on the example inputs, which compiled outputs are compared with.

A large batch is run in parts where the model seems to treat its rows apart: activations then take the room of a part.
That it does so is not taken for granted. A part whose outputs have other sizes ends the attempt, and outputs that
disagree with compiled ones are computed once more, from the whole batch, before anybody is told.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from regraft.errors import CaptureError
from regraft.ir.nodes import is_tensor, shape
from regraft.ir.program import Program

_LARGE = 4 << 20  # bytes of the largest activation that is computed at once
_FEWEST = 2  # rows of a part: a batch of one may be another case to a model


@dataclass(frozen=True)
class Reference:
    """The original ``run`` on ``args`` and ``kwargs``, which it leaves as they are."""

    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """The output on the whole example. Raises what ``run`` raises."""
        return self.run(self.args, self.kwargs)

    def in_parts(self, captured: Program) -> list[Any] | None:
        """The leaves of the output, computed a part of the batch at a time; None where ``captured`` says that the
        example is small, or has no batch, or that the model keeps a state, and where the model takes no part."""
        bounds = _bounds(captured)
        if len(bounds) < 2:
            return None
        whole: list[Any] = []
        try:
            for start, end in itertools.pairwise(bounds):
                part = _Rows(bounds[-1], start, end)
                leaves, _ = tree_flatten(self.run(*tree_map(part.of_input, (self.args, self.kwargs))))
                whole = whole or [part.room_for(leaf) for leaf in leaves]
                if len(leaves) != len(whole) or not all(map(part.put, leaves, whole)):
                    return None
        except CaptureError:  # the whole example says whether it fails for that, too
            return None
        return whole


@dataclass(frozen=True)
class _Rows:
    """Rows ``start`` to ``end`` of a batch of ``extent``."""

    extent: int
    start: int
    end: int

    def of_input(self, value: Any) -> Any:
        """These rows of an input that has the batch as its first dim."""
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == self.extent:
            return value[self.start : self.end]
        return value

    def room_for(self, leaf: Any) -> Any:
        """Room for the whole batch of an output."""
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.new_empty((self.extent, *leaf.shape[1:]))
        return leaf

    def put(self, leaf: Any, whole: Any) -> bool:
        """Put an output of these rows in its place; false where it is not one."""
        if not isinstance(leaf, Tensor):
            return leaf is whole or bool(leaf == whole)
        fits = isinstance(whole, Tensor) and leaf.dim() > 0 and leaf.dtype == whole.dtype
        if not fits or leaf.shape != (self.end - self.start, *whole.shape[1:]):
            return False
        with torch.no_grad():
            whole[self.start : self.end] = leaf
        return True


def _bounds(captured: Program) -> Sequence[int]:
    """Where parts of the batch begin, and where the last ends; empty where it is not to be divided."""
    kinds = {spec.kind for spec in captured.signature.output_specs}
    extent = _batch(captured) if kinds == {OutputKind.USER_OUTPUT} else 0
    if not extent:
        return ()
    largest = max((_bytes(node) for node in captured.graph.nodes if node.op == "call_function"), default=0)
    rows = max(extent * _LARGE // max(largest, 1), _FEWEST)
    count = extent // rows
    return [extent * number // count for number in range(count + 1)] if count else ()


def _batch(captured: Program) -> int:
    """The first size of all outputs, if it is one, and that of an input; else 0."""
    outputs = [
        node
        for node, spec in zip(captured.output_node.args[0], captured.signature.output_specs, strict=True)  # type: ignore[arg-type]
        if not isinstance(spec.arg, ConstantArgument)
    ]
    firsts = [shape(node)[0] if is_tensor(node) and shape(node) else None for node in outputs]
    extent = firsts[0] if firsts else None
    if not isinstance(extent, int) or not all(isinstance(first, int) and first == extent for first in firsts):
        return 0
    given = [value for value in tree_leaves(captured.example) if isinstance(value, Tensor) and value.dim()]
    return extent if any(value.shape[0] == extent for value in given) else 0


def _bytes(node: torch.fx.Node) -> int:
    """What a node's value takes; nothing where that is symbolic."""
    if not is_tensor(node) or not all(isinstance(size, int) for size in shape(node)):
        return 0
    return int(math.prod(shape(node)) * node.meta["val"].element_size())
