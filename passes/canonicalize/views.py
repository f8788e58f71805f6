"""Canonical spelling of operators that only move data: reshape, permute, slice, select, unsqueeze, expand."""

from __future__ import annotations

import operator
import sys
from typing import Any, cast

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, dtype, is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


def sizes_of(node: fx.Node, build: Builder) -> list[Any]:
    """The shape of ``node`` as arguments: ints, or size nodes of it where symbolic."""
    return [build.size(node, dim) for dim in range(rank(node))]


def _static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in shape(node))


@identity(
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.reshape.default,
)
def reshape_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """view, flatten, unflatten and squeeze are reshape; sizes are written out where they are static."""
    x: Any = node.args[0]
    target: list[Any]
    if _static(node):
        target = list(shape(node))
    elif "shape" in arguments(node) or "size" in arguments(node):
        given = arguments(node)
        target = list(given["shape"] if "shape" in given else given["size"])
    else:
        target = _derived_sizes(node, build)
    if node.target is aten.reshape.default and list(arguments(node)["shape"]) == target:
        return None
    return build.call(aten.reshape.default, x, target)


def _derived_sizes(node: fx.Node, build: Builder) -> list[Any]:
    """Sizes of a symbolic flatten or squeeze; at most one of them is left to be inferred."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    target: list[Any] = []
    available = [(size, dim) for dim, size in enumerate(shape(x))]
    for size in shape(node):
        if isinstance(size, int):
            target.append(size)
            continue
        source = next((dim for known, dim in available if size_equal(known, size)), None)
        target.append(-1 if source is None else build.size(x, source))
    if target.count(-1) > 1:
        raise ValueError(f"{node.target} has more than one size that its input does not have")
    return target


@identity(
    aten.t.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.mT.default,
    aten.numpy_T.default,
    aten.adjoint.default,
    aten.permute.default,
)
def permute_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """transpose, t, mT and movedim are permute with non-negative dims."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if node.target is aten.permute.default and all(dim >= 0 for dim in arguments(node)["dims"]):
        return None
    labels = torch.empty([2 + i for i in range(rank(x))], device="meta")
    moved = node.target(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return build.call(aten.permute.default, x, [size - 2 for size in moved.shape])


@identity(operator.getitem)
def part_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """One part of chunk, split or unbind is a slice or a select."""
    source, place = node.args
    if not isinstance(source, fx.Node) or source.op != "call_function" or not isinstance(place, int):
        return None
    given = arguments(source) if isinstance(source.target, torch._ops.OpOverload) else {}
    x = given.get("self")
    if source.target is aten.unbind.int and isinstance(x, fx.Node):
        return build.call(aten.select.int, x, _negative(given["dim"], x), place)
    if source.target not in _SPLITS or not isinstance(x, fx.Node) or not isinstance(place, int):
        return None
    dim = _negative(given["dim"], x)
    extents = [shape_of[dim] for shape_of in (part.shape for part in source.meta["val"])]
    if not all(isinstance(extent, int) for extent in extents):
        return None
    place %= len(extents)
    start = sum(extents[:place])
    return build.call(aten.slice.Tensor, x, dim, start, start + extents[place])


_SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


def _negative(dim: int, x: fx.Node) -> int:
    return dim if dim < 0 else dim - rank(x)


@identity(aten.narrow.default)
def narrow_is_slice(node: fx.Node, build: Builder) -> fx.Node | None:
    """narrow(x, dim, start, length) is slice(x, dim, start, start + length)."""
    given = arguments(node)
    start, length = given["start"], given["length"]
    if not (isinstance(start, int) and isinstance(length, int)):
        return None
    x = given["self"]
    end = start + length
    if start < 0 and end == 0:  # counted from the end, 0 would be the first place
        end = sys.maxsize
    return build.call(aten.slice.Tensor, x, _negative(given["dim"], x), start, end)


@identity(aten.slice.Tensor)
def slice_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """Slices count their dim from the end, their bounds from the start; a whole slice is dropped."""
    given = arguments(node)
    x, dim, step = given["self"], _negative(given["dim"], given["self"]), given["step"]
    extent = shape(x)[dim]
    if sizes_equal(shape(node), shape(x)) and step == 1:
        return cast(fx.Node, x)
    if not isinstance(extent, int):
        return None if dim == given["dim"] else build.call(aten.slice.Tensor, x, dim, *node.args[2:])
    bounds = (given["start"] or 0, extent if given["end"] is None else given["end"])
    if not all(isinstance(bound, int) for bound in bounds):
        return None
    start, end, _ = slice(*bounds).indices(extent)
    wanted = (x, dim, start, end) if step == 1 else (x, dim, start, end, step)
    return None if node.args == wanted else build.call(aten.slice.Tensor, *wanted)


@identity(aten.select.int)
def select_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """select counts its dim from the end and its index from the start."""
    x, dim, index = node.args
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    extent = shape(x)[dim]
    if isinstance(index, int) and index < 0 and isinstance(extent, int):
        index += extent
    wanted = (x, _negative(dim, x), index)
    return None if node.args == wanted else build.call(aten.select.int, *wanted)


@identity(aten.unsqueeze.default)
def unsqueeze_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """unsqueeze counts its dim from the end."""
    x, dim = node.args
    assert isinstance(dim, int)
    return None if dim < 0 else build.call(aten.unsqueeze.default, x, dim - rank(node))


@identity(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """expand writes its sizes out; one that changes nothing is dropped."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if sizes_equal(shape(node), shape(x)):
        return x
    if node.target is aten.expand_as.default:
        return build.call(aten.expand.default, x, sizes_of(node.args[1], build))  # type: ignore[arg-type]
    wanted = list(shape(node)) if _static(node) else list(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.expand.default and list(node.args[1]) == wanted:  # type: ignore[arg-type]
        return None
    return build.call(aten.expand.default, x, wanted)


@identity(aten.permute.default)
def permute_of_permute(node: fx.Node, build: Builder) -> fx.Node | None:
    """permute(permute(x, p), q) is permute(x, p[q]); the identity permutation is dropped."""
    x, dims = node.args
    assert isinstance(x, fx.Node)
    order = list(dims)  # type: ignore[arg-type]
    if order == list(range(len(order))):
        return x
    if x.target is not aten.permute.default:
        return None
    inner = list(x.args[1])  # type: ignore[arg-type]
    return build.call(aten.permute.default, x.args[0], [inner[dim] for dim in order])


@identity(aten.reshape.default)
def reshape_of_reshape(node: fx.Node, build: Builder) -> fx.Node | None:
    """reshape(reshape(x, a), b) is reshape(x, b); a reshape to the same shape is dropped."""
    x, sizes = node.args
    assert isinstance(x, fx.Node)
    if sizes_equal(shape(node), shape(x)):
        return x
    if x.target is aten.reshape.default:
        return build.call(aten.reshape.default, x.args[0], sizes)
    if x.target is aten.unsqueeze.default:
        return build.call(aten.reshape.default, x.args[0], sizes)
    return None


@identity(aten.slice.Tensor)
def slice_of_slice(node: fx.Node, build: Builder) -> fx.Node | None:
    """A slice of a slice along the same dim is one slice."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or x.target is not aten.slice.Tensor:
        return None
    if len(node.args) != 4 or len(x.args) != 4 or node.args[1] != x.args[1]:
        return None
    bounds: list[Any] = [*node.args[2:], *x.args[2:]]
    if not all(map(_from_start, bounds)):
        return None
    start, end, base, limit = bounds
    return build.call(aten.slice.Tensor, x.args[0], node.args[1], base + start, min(base + end, limit))


@identity(aten.slice.Tensor)
def slice_of_concatenation(node: fx.Node, build: Builder) -> fx.Node | None:
    """A slice of a concatenation that lies in one of the parts is a slice of that part."""
    cut = _cut(node)
    if cut is None or cut[0].target is not aten.cat.default:
        return None
    x, dim, start, end = cut
    given = arguments(x)
    parts = given["tensors"]
    if _negative(given["dim"], x) != dim or not _like(parts, node):
        return None
    place = 0
    for part in parts:
        extent = shape(part)[dim]
        if not isinstance(extent, int):
            return None
        if place <= start and end <= place + extent:
            return build.call(aten.slice.Tensor, part, dim, start - place, end - place)
        place += extent
    return None


def _like(parts: Any, whole: fx.Node) -> bool:
    """Whether parts of a concatenation are of its rank and type: others are left out of it, or converted."""
    return all(rank(part) == rank(whole) and dtype(part) == dtype(whole) for part in parts)


@identity(aten.slice.Tensor)
def slice_of_gathered_rows(node: fx.Node, build: Builder) -> fx.Node | None:
    """Some columns of gathered rows are gathered rows of some columns, where nothing else of them is read, and nothing
    twice: what was joined to be gathered together need not be joined."""
    cut = _cut(node)
    if cut is None or cut[0].target is not aten.gather.default:
        return None
    x, dim, start, end = cut
    given = arguments(x)
    source, index, extent = given["self"], given["index"], shape(x)[dim]
    if _negative(given["dim"], x) == dim or not is_call(index, (aten.expand.default,)) or not isinstance(extent, int):
        return None
    numbers, read = index.args[0], [user for user in x.users if (_cut(user) or ())[:2] == (x, dim)]
    whole = rank(numbers) == rank(index) and size_equal(shape(numbers)[dim], 1)
    if not whole or len(read) < len(x.users) or sum(shape(user)[dim] for user in read) > extent:
        return None
    sizes = list(index.args[1])
    sizes[dim] = shape(node)[dim]
    rows = build.call(aten.slice.Tensor, source, dim, start, end)
    return build.call(aten.gather.default, rows, given["dim"], build.call(aten.expand.default, numbers, sizes))


@identity(aten.embedding.default)
def embedding_of_repeated_rows(node: fx.Node, build: Builder) -> fx.Node | None:
    """Rows that are looked up for each sample alike (positions, a type of token) are looked up once."""
    given = arguments(node)
    numbers = given["indices"]
    if not is_call(numbers, (aten.expand.default,)):
        return None
    rows = build.call(aten.embedding.default, given["weight"], numbers.args[0], *node.args[2:], **node.kwargs)
    return build.call(aten.expand.default, rows, [*numbers.args[1], shape(node)[-1]])


def _cut(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """What a slice at numbers that count from the start cuts, along which dim, from where to where."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or not isinstance(node.args[0], fx.Node):
        return None
    x, dim, *bounds = node.args
    return (x, dim, *bounds) if all(map(_from_start, bounds)) else None  # type: ignore[return-value]


def _from_start(bound: Any) -> bool:
    """Whether a bound of a slice is a number that counts from the start; along a symbolic size one may count from the
    end."""
    return isinstance(bound, int) and bound >= 0


SPELLINGS = (
    reshape_spelling,
    permute_spelling,
    part_spelling,
    narrow_is_slice,
    slice_spelling,
    select_spelling,
    unsqueeze_spelling,
    expand_spelling,
)
SIMPLIFICATIONS = (
    permute_of_permute,
    reshape_of_reshape,
    slice_of_slice,
    slice_of_concatenation,
    slice_of_gathered_rows,
    embedding_of_repeated_rows,
)

__all__ = ["SIMPLIFICATIONS", "SPELLINGS", "is_tensor", "sizes_of"]
