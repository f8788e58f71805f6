"""A cut: consecutive rows of a tensor along one dim, which is all that is read of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, is_call, rank, shape, size_equal

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """``length`` rows from ``start`` on along ``dim``, which counts from the front. Where the size is symbolic a
    negative ``start`` counts from its end."""

    dim: int
    start: int
    length: int

    def of(self, node: fx.Node, build: Builder, dim: int | None = None) -> fx.Node:
        """These rows of ``node``, along ``dim`` where that is not the cut's own."""
        end = self.start + self.length
        place = (self.dim if dim is None else dim) % rank(node)
        # In canonical form dims count from the end; written alike, equal cuts are merged.
        return build.call(aten.slice.Tensor, node, place - rank(node), self.start, end if end else sys.maxsize)


def cut_of(node: fx.Node) -> Cut | None:
    """What a slice or a select reads, where that is less than there is; None for any other node, for other steps than
    one, and where the places are known only at run time."""
    if not is_call(node, (aten.slice.Tensor, aten.select.int)):
        return None
    given, one = arguments(node), is_call(node, (aten.select.int,))
    source, dim = given["self"], given["dim"] % rank(given["self"])
    size = shape(source)[dim]
    start, length = (given["index"], 1) if one else (given["start"] or 0, shape(node)[dim])
    known = isinstance(start, int) and isinstance(length, int) and (one or given["step"] == 1)
    if not known or length < 1 or size_equal(size, length):
        return None
    if isinstance(size, int) and start < 0:
        start = max(start + size, 0)
    return Cut(dim, start, length)
