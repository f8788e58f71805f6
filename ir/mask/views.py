"""Handlers for views and indexing: the same values read through other indices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.fx import Node

from regraft.ir.mask.expression import ONE, ZERO, Expression, bounds, const, index, is_integer
from regraft.ir.mask.interpret import Opaque, Reader, fake, handles, same_size, size_expression
from regraft.ir.mask.logic import add, boolean, less_equal, multiply, number, substitute, subtract, where

Extent = int | torch.SymInt
_FAR = 2**62


def _is_one(extent: Extent) -> bool:
    return isinstance(extent, int) and extent == 1


def _through(reader: Reader, indices: Sequence[Expression]) -> Expression:
    """The operand read at one index expression per dimension, from the left."""
    rank = len(indices)
    return substitute(reader.expression(reader.first), {dim - rank: value for dim, value in enumerate(indices)})


def _matching(reader: Reader) -> list[Expression]:
    """Indices of the operand when only dimensions of size 1 were added or removed."""
    source, target = reader.tensor(reader.first).shape, reader.value.shape
    kept_source = [dim for dim, extent in enumerate(source) if not _is_one(extent)]
    kept_target = [dim for dim, extent in enumerate(target) if not _is_one(extent)]
    if len(kept_source) != len(kept_target):
        raise Opaque
    indices: list[Expression] = [ZERO] * len(source)
    for dim, place in zip(kept_source, kept_target, strict=True):
        if not same_size(source[dim], target[place]):
            raise Opaque
        indices[dim] = index(place - len(target))
    return indices


@handles("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(reader: Reader) -> Expression:
    if reader.value.dtype != reader.tensor(reader.first).dtype:
        raise Opaque  # view.dtype reads other bytes
    return _through(reader, _matching(reader))


@handles("expand", "expand_as", "broadcast_to")
def _expand(reader: Reader) -> Expression:
    return reader.elementwise(reader.first)


@handles("repeat", "tile")
def _repeat(reader: Reader) -> Expression:
    source, target = reader.tensor("self").shape, reader.value.shape
    for extent, size in zip(reversed(source), reversed(target), strict=False):
        if not _is_one(extent) and not same_size(extent, size):
            raise Opaque
    return reader.expression("self")


@handles("permute")
def _permute(reader: Reader) -> Expression:
    order = [dim % reader.value.dim() for dim in reader.raw("dims")]
    rank = len(order)
    return _through(reader, [index(order.index(dim) - rank) for dim in range(rank)])


@handles("transpose", "t", "swapaxes", "numpy_T", "mT")
def _transpose(reader: Reader) -> Expression:
    rank = reader.value.dim()
    first, second = (reader.integer(name) if name in reader else dim for name, dim in (("dim0", -1), ("dim1", -2)))
    places = list(range(-rank, 0))
    if rank > 1:
        places[first], places[second] = places[second], places[first]
    return _through(reader, [index(place) for place in places])


@handles("slice")
def _slice(reader: Reader) -> Expression:
    source = reader.tensor("self").shape
    rank = len(source)
    dim = reader.integer("dim") % rank
    step = reader.integer("step")
    start = reader.expression("start") if "start" in reader else ZERO
    extent = size_expression(source[dim])
    if bounds(start)[0] < 0:
        end = reader.raw("end")
        if step != 1 or not (end is None or (isinstance(end, int) and end >= _FAR)):
            if not (bounds(start)[1] < 0 and bounds(add(start, extent))[0] >= 0):
                raise Opaque
            start = add(start, extent)
        else:  # t[-n:]: the start follows from the two sizes, clamped or not
            start = subtract(extent, size_expression(reader.value.shape[dim]))
    indices: list[Expression] = [index(place - rank) for place in range(rank)]
    indices[dim] = add(start, multiply(const(step), index(dim - rank)))
    return _through(reader, indices)


@handles("narrow")
def _narrow(reader: Reader) -> Expression:
    rank = reader.value.dim()
    start = reader.expression("start")
    if bounds(start)[0] < 0:
        raise Opaque
    indices: list[Expression] = [index(place - rank) for place in range(rank)]
    dim = reader.integer("dim") % rank
    indices[dim] = add(start, index(dim - rank))
    return _through(reader, indices)


@handles("select")
def _select(reader: Reader) -> Expression:
    source = reader.tensor("self").shape
    rank = len(source)
    dim = reader.integer("dim") % rank
    place = reader.expression("index")
    if bounds(place)[0] < 0:
        if bounds(place)[1] >= 0:
            raise Opaque
        place = add(place, size_expression(source[dim]))
    left = [index(place_left - rank + 1) for place_left in range(dim)]
    right = [index(place_right - rank) for place_right in range(dim + 1, rank)]
    return _through(reader, [*left, place, *right])


@handles("index")
def _index(reader: Reader) -> Expression:
    """Advanced indexing by integer tensors in adjacent dimensions: their indices replace those dimensions."""
    source = reader.tensor("self").shape
    rank = len(source)
    indices = list(reader.raw("indices"))
    used = [dim for dim, item in enumerate(indices) if item is not None]
    if not used or used[-1] - used[0] + 1 != len(used):
        raise Opaque
    behind = rank - 1 - used[-1]  # plain dimensions after the indexed ones
    broadcast = reader.value.dim() - (rank - len(used))
    places: list[Expression] = [index(dim - used[0] - broadcast - behind) for dim in range(used[0])]
    for dim in used:
        places.append(_index_value(reader, indices[dim], behind))
    places += [index(dim - rank) for dim in range(used[-1] + 1, rank)]
    return _through(reader, places)


def _index_value(reader: Reader, item: object, behind: int) -> Expression:
    value = fake(item) if isinstance(item, Node) else None
    if value is None or value.dtype not in (torch.int64, torch.int32):
        raise Opaque
    expression = reader.read(item)
    if not is_integer(expression) or bounds(expression)[0] < 0:
        raise Opaque  # a negative index counts from the end
    return substitute(expression, {dim: index(dim - behind) for dim in range(-value.dim(), 0)})


@handles("gather")
def _gather(reader: Reader) -> Expression:
    rank = reader.value.dim()
    dim = reader.integer("dim") % rank
    indices: list[Expression] = [index(place - rank) for place in range(rank)]
    place = reader.expression("index")
    if not is_integer(place) or bounds(place)[0] < 0:
        raise Opaque
    indices[dim] = place
    return _through(reader, indices)


@handles("cat", "concat")
def _concatenate(reader: Reader) -> Expression:
    """Pieces side by side: piece ``i`` where the index is below the sum of the first ``i + 1`` sizes."""
    tensors = list(reader.raw("tensors"))
    dim = reader.integer("dim")
    dim = dim if dim < 0 else dim - reader.value.dim()
    if len(tensors) > 4:
        raise Opaque
    start: Expression = ZERO
    pieces: list[tuple[Expression, Expression]] = []
    for item in tensors:
        value = fake(item)
        if value is None or value.dim() != reader.value.dim():
            raise Opaque
        here = {dim: subtract(index(dim), start)}
        pieces.append((start, substitute(number(reader.read(item)), here)))
        start = add(start, size_expression(value.shape[dim]))
    result = pieces[-1][1]
    for (_, piece), (stop, _) in reversed(list(pairwise(pieces))):
        result = where(less_equal(add(index(dim), ONE), stop), piece, result)
    return result


@handles("pad", "constant_pad_nd")
def _pad(reader: Reader) -> Expression:
    """A constant beyond the operand; a negative amount cuts."""
    amounts = list(reader.raw("pad"))
    source = reader.tensor("self").shape
    if reader.raw("mode") not in (None, "constant") or not all(isinstance(amount, int) for amount in amounts):
        raise Opaque
    indices: list[Expression] = [index(dim - len(source)) for dim in range(len(source))]
    inside: list[Expression] = []
    for number_of_dim, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        dim = -1 - number_of_dim
        indices[dim] = subtract(index(dim), const(before))
        if before > 0:
            inside.append(less_equal(const(before), index(dim)))
        if after > 0:
            inside.append(less_equal(add(indices[dim], ONE), size_expression(source[dim])))
    alike = boolean if reader.value.dtype == torch.bool else number
    result, filling = alike(_through(reader, indices)), alike(reader.expression("value") if "value" in reader else ZERO)
    for condition in inside:
        result = where(condition, result, filling)
    return result
