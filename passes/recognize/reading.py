"""Small questions that recognising rules ask about canonical nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, dtype, is_call, is_tensor, rank, shape, size_equal

aten = torch.ops.aten


def uncast(node: fx.Node) -> fx.Node:
    """What a cast is a cast of; any other node itself."""
    source = node.args[0] if is_call(node, (aten.to.dtype,)) else node
    return source if isinstance(source, fx.Node) else node


def widening_source(node: fx.Node) -> fx.Node:
    """What ``node`` is the fp32 form of; the node itself where it is no such cast."""
    source = uncast(node)
    return source if dtype(node) == torch.promote_types(dtype(source), torch.float32) else node


def is_vector(node: Any, size: Any) -> bool:
    """Whether ``node`` is a tensor of one dimension with ``size`` entries."""
    return is_tensor(node) and rank(node) == 1 and size_equal(shape(node)[0], size)


def is_last_dim(dims: Any) -> bool:
    """Whether a reduction's dims name the last dimension alone."""
    return isinstance(dims, (list, tuple)) and list(dims) == [-1]


def is_near(value: Any, expected: float) -> bool:
    """Whether a constant of the source is ``expected``, written with at least six correct digits."""
    return isinstance(value, (int, float)) and abs(value - expected) <= 1e-6 * abs(expected)


def slice_of(node: Any) -> tuple[fx.Node, Any, Any, Any] | None:
    """``(source, start, end, step)`` of a slice of the last dimension; None for any other node."""
    if not is_call(node, (aten.slice.Tensor,)):
        return None
    given = arguments(node)
    return (given["self"], given["start"], given["end"], given["step"]) if given["dim"] == -1 else None


def again(node: fx.Node, build: Builder) -> fx.Node:
    """A call like ``node``'s, for a match that also reads what ``node`` is a view or a cast of.

    A rewrite is checked on the inputs of its new nodes; with ``node`` itself as input, its source would be
    another input, unrelated to it.
    """
    target = node.target
    assert callable(target)
    return build.call(target, *node.args, **node.kwargs)
