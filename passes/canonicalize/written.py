"""Tensors that are written part by part: where the parts cover all of one, it is made of them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, dtype, is_call, rank, shape, sizes_equal
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


@dataclass(frozen=True)
class _Part:
    """What is written to the entries ``start``, ``start + step``, … before ``end`` of one dim."""

    written: fx.Node
    start: int
    end: int
    step: int


@identity(aten.slice_scatter.default)
def written_in_parts(node: fx.Node, build: Builder) -> fx.Node | None:
    """Parts side by side are joined, and every other entry is stacked with its neighbour; what lay there is gone."""
    dim = arguments(node)["dim"] % rank(node)
    size = shape(node)[dim]
    if not isinstance(size, int):
        return None
    parts = _parts(node, dim, size)
    if [(part.start, part.end, part.step) for part in parts] == [(0, size, 2), (1, size, 2)] and size % 2 == 0:
        made = build.call(aten.stack.default, _contents(parts, build), dim - rank(node))
        made = build.call(aten.reshape.default, made, [build.size(node, place) for place in range(rank(node))])
    elif _are_side_by_side(parts, size):
        made = build.call(aten.cat.default, _contents(parts, build), dim - rank(node))
    else:
        return None
    return made if dtype(made) == dtype(node) else build.call(aten.to.dtype, made, dtype(node))


def _are_side_by_side(parts: list[_Part], size: int) -> bool:
    ends = [0, *(part.end for part in parts)]
    joined = len(parts) > 1 and ends[-1] == size and [part.start for part in parts] == ends[:-1]
    return joined and all(part.step == 1 and part.start < part.end for part in parts)


def _parts(node: Any, dim: int, size: int) -> list[_Part]:
    """What was written along ``dim``, in the order of its places."""
    found = []
    while is_call(node, (aten.slice_scatter.default,)):
        given = arguments(node)
        bounds = given["start"] or 0, size if given["end"] is None else given["end"], given["step"]
        if given["dim"] % rank(node) != dim or any(not isinstance(bound, int) for bound in bounds):
            break
        start, end = (min(bound + size if bound < 0 else bound, size) for bound in bounds[:2])
        found.append(_Part(given["src"], start, end, bounds[2]))
        node = given["self"]
    return sorted(found, key=lambda part: part.start)


def _contents(parts: list[_Part], build: Builder) -> list[fx.Node]:
    """What is written, in the shapes that it has there, and in one type: its own, which is then converted once."""
    contents = [_content(part.written, build) for part in parts]
    if len({dtype(content) for content in contents}) == 1:
        return contents
    wanted = dtype(parts[0].written)
    return [node if dtype(node) == wanted else build.call(aten.to.dtype, node, wanted) for node in contents]


def _content(written: fx.Node, build: Builder) -> fx.Node:
    if not is_call(written, (aten.copy.default,)):
        return written
    content = written.args[1]
    assert isinstance(content, fx.Node)
    if sizes_equal(shape(content), shape(written)):
        return content
    return build.call(aten.expand.default, content, [build.size(written, dim) for dim in range(rank(written))])


SPELLINGS = (written_in_parts,)
