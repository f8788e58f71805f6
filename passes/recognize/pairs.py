"""How rotary embeddings lay out the pairs that they turn: neighbours, halves, and the rest that passes."""

from __future__ import annotations

import torch
from torch import fx

from regraft.ir.nodes import Builder, is_call, rank, shape, size_equal, sizes_equal
from regraft.passes.recognize.reading import slice_of

aten = torch.ops.aten


def unreshaped(node: fx.Node) -> fx.Node:
    """``node`` without the reshape on it, if there is one."""
    source = node.args[0] if is_call(node, (aten.reshape.default,)) else node
    return source if isinstance(source, fx.Node) else node


def is_paired(pairs: fx.Node, x: fx.Node) -> bool:
    """Whether ``pairs`` is ``x`` with its last dimension split into ``(size / 2, 2)``."""
    *leading, size = shape(x)
    same_shape = sizes_equal(shape(pairs), (*leading, size // 2, 2))
    return same_shape and unreshaped(pairs) in (x, unreshaped(x))


def flat_pairs(pairs: fx.Node, build: Builder) -> fx.Node:
    """``[..., size / 2, 2]`` as ``[..., size]``: what it was reshaped from, where that has this shape."""
    wanted = (*shape(pairs)[:-2], shape(pairs)[-2] * 2)
    if sizes_equal(shape(unreshaped(pairs)), wanted):
        return unreshaped(pairs)
    leading = [build.size(pairs, dim) for dim in range(rank(pairs) - 2)]
    return build.call(aten.reshape.default, pairs, [*leading, wanted[-1]])


def rest_of(x: fx.Node, passed: fx.Node) -> fx.Node | None:
    """The tensor that ``x`` is the front and ``passed`` the rest of; None when they are not."""
    front, rest = slice_of(x), slice_of(passed)
    if front is None or rest is None or front[0] is not rest[0]:
        return None
    whole, start, end, step = rest
    fits = (*front[1:], start, step) == (0, start, 1, start, 1) and size_equal(end, shape(whole)[-1])
    return whole if fits else None


def deinterleaved(x: fx.Node) -> fx.Node | None:
    """The interleaved tensor that ``x`` is the halved order of; None when it is not."""
    if not is_call(x, (aten.reshape.default,)) or not is_call(unreshaped(x), (aten.permute.default,)):
        return None
    pairs, dims = unreshaped(x).args
    assert isinstance(pairs, fx.Node) and isinstance(dims, (list, tuple))
    *leading, size = shape(x)
    last = rank(pairs) - 1
    swapped = list(dims) == [*range(last - 1), last, last - 1]
    if not swapped or not sizes_equal(shape(pairs), (*leading, size // 2, 2)):
        return None
    return unreshaped(pairs)
