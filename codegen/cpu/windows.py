"""Products on windows of an image read and write it where it lies: the copies that cut it up and put it together again
are never made.

A window's pixels are two dims of the image, and so are the windows: a reshape that joins them has to copy, but the
native product takes rows, depth and columns of two dims each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from regraft.codegen.cpu.native.batched import BATCH, PAIR
from regraft.codegen.cpu.native_operators import batched_native, reshaped_native, windows_native
from regraft.ir.nodes import last_two_swapped

aten = torch.ops.aten
Sizes = tuple[int, ...]
_MOST = (BATCH, PAIR, PAIR)


@dataclass(frozen=True)
class _Apart:
    """A matrix with leading dims: ``node`` permuted by ``order`` has the dims of three ``groups``, joined or not: those
    of the batch, of rows and of columns."""

    node: fx.Node
    order: Sizes
    groups: tuple[Sizes, Sizes, Sizes]
    copied: bool

    def renumbered(self) -> _Apart:
        """The same for who counts the dims of columns before those of rows."""
        batch, rows, columns = self.groups
        first, second, last = (sum(map(len, self.groups[:count])) for count in (1, 2, 3))
        places = [*range(first), *range(first + last - second, last), *range(first, first + last - second)]
        return _Apart(self.node, tuple(places[dim] for dim in self.order), (batch, columns, rows), self.copied)


def multiply_in_place(graph: fx.Graph) -> None:
    """Let native products of a lowered graph read in front of copies, and write behind them."""
    for node in list(graph.nodes):
        if node.target is batched_native:
            _take_copies(graph, node)


def _take_copies(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a product by one that reads in front of as many copies as it has dims for."""
    choices = itertools.product(*(_operands(operand) for operand in node.args[:2]))
    any(_is_replaced(graph, node, left, right) for left, right in choices)


def _is_replaced(graph: fx.Graph, node: fx.Node, left: _Apart, right: _Apart) -> bool:
    """Whether a product with these operands was put in the place of ``node``."""
    result = _result(node)
    if result is None and not left.copied and not right.copied:
        return False
    out, last = result or (None, node)
    sides = [
        (left.groups[0], right.groups[0]),
        (left.groups[1],),
        (left.groups[2], right.groups[1]),
        (right.groups[2],),
    ]
    if out is not None:
        for place, side in ((0, 0), (1, 1), (3, 2)):
            sides[place] = (*sides[place], out.groups[side])
    found = [_finest(sizes) for sizes in sides]
    if any(dims is None or len(dims) > most for dims, most in zip(found, (BATCH, PAIR, PAIR, PAIR), strict=True)):
        return False
    batch, rows, depth, columns = (dims for dims in found if dims is not None)
    with graph.inserting_before(last):
        operands = [
            _emit(graph, left, (batch, rows, depth)),
            _emit(graph, right, (batch, depth, columns)),
        ]
        order = tuple(range(BATCH + 2 * PAIR)) if out is None else _order(out, (batch, rows, columns))
        made = graph.call_function(windows_native, (*operands, order, list(_sizes(last) or ())))
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made, propagate_meta=False)
    return True


def _operands(node: object) -> Iterator[_Apart]:
    """What a product may read for an operand: what lies in front of a copy, where there is one, else the operand."""
    sizes = _sizes(node) if isinstance(node, fx.Node) else None
    if not isinstance(node, fx.Node) or sizes is None or len(sizes) < 2:
        return
    behind = [node]
    while behind[-1].target in (aten.permute.default, aten.reshape.default):
        source = behind[-1].args[0]
        assert isinstance(source, fx.Node)
        behind.append(source)
    in_front = _in_front(behind) if behind[-1].target is reshaped_native else None
    if in_front is not None:
        yield in_front
    yield _Apart(node, tuple(range(len(sizes))), (sizes[:-2], sizes[-2:-1], sizes[-1:]), False)


def _in_front(behind: Sequence[fx.Node]) -> _Apart | None:
    """The first of ``behind``, a matrix, read in front of the last, a copy: what the copy reads, its dims ordered and
    joined as the copy and the views behind it do. None where one of these splits a dim."""
    source = behind[-1].args[0]
    sizes = _sizes(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or sizes is None:
        return None
    ones = [dim for dim, size in enumerate(sizes) if size == 1]
    parts: list[Sizes] = [() if dim in ones else (dim,) for dim in range(len(sizes))]  # dims of the source in each dim
    for node in reversed(behind):
        if node.target is aten.permute.default:
            parts = [parts[dim] for dim in node.args[1]]  # type: ignore[union-attr, index]
            continue
        joined, order = _sizes(node), [dim for part in parts for dim in part]
        pieces = None if joined is None else _pieces(tuple(sizes[dim] for dim in order), joined)
        if pieces is None:
            return None
        left = iter(order)
        parts = [tuple(itertools.islice(left, len(piece))) for piece in pieces]
    *leading, rows, columns = parts
    groups = ((*ones, *itertools.chain(*leading)), rows, columns)
    batch, down, across = (tuple(sizes[dim] for dim in group) for group in groups)
    return _Apart(source, tuple(itertools.chain(*groups)), (batch, down, across), True)


def _result(node: fx.Node) -> tuple[_Apart, fx.Node] | None:
    """The copy behind a product that nothing else reads: a reshape into more dims, these permuted, a reshape. Rows and
    columns may be exchanged before."""
    product = _sole_user(node, (aten.permute.default,))
    turned = product is not None and _swaps_last(product)
    chain = [product if turned and product is not None else node]
    for targets in ((aten.reshape.default,), (aten.permute.default,), (aten.reshape.default, reshaped_native)):
        user = _sole_user(chain[-1], targets)
        if user is None:
            return None
        chain.append(user)
    product, split, permuted, last = chain
    sizes, dims = _sizes(product), _sizes(split)
    if sizes is None or dims is None or _sizes(last) is None:
        return None
    groups = _grouped(dims, (math.prod(sizes[:-2]), *sizes[-2:]))
    if groups is None:
        return None
    out = _Apart(split, tuple(permuted.args[1]), groups, True)  # type: ignore[arg-type]
    return out.renumbered() if turned else out, last


def _sole_user(node: fx.Node, targets: tuple[object, ...]) -> fx.Node | None:
    """The call of one of ``targets`` on ``node`` that alone reads it."""
    (user, *others) = (*node.users, None)[:2] if node.users else (None,)
    if user is None or any(others) or user.target not in targets or user.args[0] is not node:
        return None
    return user


def _swaps_last(node: fx.Node) -> bool:
    order = list(node.args[1])  # type: ignore[arg-type]
    return len(order) > 1 and order == last_two_swapped(len(order))


def _sizes(node: fx.Node) -> Sizes | None:
    """The shape of a value, where it is known and nothing in it is empty."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) and size for size in value.shape):
        return None
    return tuple(value.shape)


def _grouped(dims: Sequence[int], joined: Sequence[int]) -> tuple[Sizes, Sizes, Sizes] | None:
    """``dims`` cut into pieces whose products are ``joined``; None where they are not."""
    pieces: list[list[int]] = []
    left = iter(dims)
    for size in joined:
        pieces.append([])
        while math.prod(pieces[-1]) < size:
            dim = next(left, None)
            if dim is None:
                return None
            pieces[-1].append(dim)
        if math.prod(pieces[-1]) != size:
            return None
    pieces[-1] += left
    if math.prod(pieces[-1]) != joined[-1]:
        return None
    return tuple(map(tuple, pieces))  # type: ignore[return-value]


def _finest(choices: Sequence[Sizes]) -> Sizes | None:
    """The one that all others are joins of, without dims of one."""
    plain = [tuple(size for size in sizes if size != 1) for sizes in choices]
    finest = max(plain, key=len)
    return finest if all(_pieces(finest, sizes) is not None for sizes in plain) else None


def _pieces(finest: Sizes, joined: Sizes) -> list[Sizes] | None:
    """The dims of ``finest`` that each of ``joined`` stands for."""
    found: list[Sizes] = []
    place = 0
    for size in joined:
        start = place
        while place < len(finest) and math.prod(finest[start:place]) < size:
            place += 1
        if math.prod(finest[start:place]) != size:
            return None
        found.append(finest[start:place])
    return found if place == len(finest) else None


def _padded(groups: Sequence[Sizes]) -> Iterator[int]:
    for dims, most in zip(groups, _MOST, strict=True):
        yield from (1,) * (most - len(dims))
        yield from dims


def _emit(graph: fx.Graph, operand: _Apart, groups: tuple[Sizes, Sizes, Sizes]) -> fx.Node:
    """The operand as the product takes it: a view, as dims are only split."""
    node = operand.node
    if operand.order != tuple(range(len(operand.order))):
        node = graph.call_function(aten.permute.default, (node, list(operand.order)))
    return graph.call_function(aten.reshape.default, (node, list(_padded(groups))))


def _order(out: _Apart, groups: tuple[Sizes, Sizes, Sizes]) -> Sizes:
    """The dims of a result in the order of ``out``, by their places among all that the product has."""
    places: list[list[int]] = []
    first = 0
    for dims, held, most in zip(groups, out.groups, _MOST, strict=True):
        place = first + most - len(dims)
        for size in held:
            start = place
            while math.prod(dims[start - first - most + len(dims) : place - first - most + len(dims)]) < size:
                place += 1
            places.append(list(range(start, place)))
        first += most
    named = [place for dim in out.order for place in places[dim]]
    return (*(place for place in range(BATCH + 2 * PAIR) if place not in named), *named)
