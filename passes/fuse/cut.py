"""A cut: consecutive rows of a tensor along one dim, which is all that is read of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, is_call, rank, shape, size_equal

aten = torch.ops.aten

_NEARLY_ALL = 15 / 16  # of the rows: what is computed for the others is no loss beside the copy of a slice


@dataclass(frozen=True)
class Cut:
    """``length`` rows from ``start`` on along ``dim``, which counts from the front. Where the size is symbolic a
    negative ``start`` counts from its end."""

    dim: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """The place behind the last of these rows; 0 where that is the end itself."""
        return self.start + self.length

    def of(self, node: fx.Node, build: Builder, dim: int | None = None) -> fx.Node:
        """These rows of ``node``, along ``dim`` where that is not the cut's own."""
        place = (self.dim if dim is None else dim) % rank(node)
        # In canonical form dims count from the end; written alike, equal cuts are merged.
        return build.call(aten.slice.Tensor, node, place - rank(node), self.start, self.end or sys.maxsize)


def cut_around(cuts: Sequence[Cut]) -> Cut | None:
    """The rows from the first to the last that any of ``cuts`` reads; None where they are of different dims, or count
    from different ends."""
    if len({(cut.dim, cut.start < 0) for cut in cuts}) != 1:
        return None
    start = min(cut.start for cut in cuts)
    return Cut(cuts[0].dim, start, max(cut.end for cut in cuts) - start)


def is_nearly_all(kept: Any, rows: Any) -> bool:
    """Whether ``kept`` of ``rows`` leaves few out; False where one of them is symbolic."""
    return isinstance(kept, int) and isinstance(rows, int) and _NEARLY_ALL * rows <= kept


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
