"""Attention of some of its queries: the same mask, said of those rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from regraft.ir import ops
from regraft.ir.mask import (
    KEY_LENGTH,
    QUERY_LENGTH,
    Band,
    Chunk,
    Dense,
    Everything,
    Keys,
    Length,
    Lengths,
    Nothing,
    Predicate,
    Prefix,
    Rows,
    Same,
    parse,
    simplify,
)
from regraft.ir.mask.length import symbol
from regraft.ir.mask.predicate import Heads, map_atoms, renumber, tensors_of
from regraft.ir.nodes import Builder, arguments, rank, shape, size_equal
from regraft.passes.fuse.cut import Cut
from regraft.passes.refused import Refused

_QUERIES = 2  # the dim of [batch, heads, length, head_dim]


def attention_of_rows(node: fx.Node, cut: Cut, build: Builder) -> fx.Node | None:
    """The attention ``node`` of some of its queries. None along another dim, with ALiBi's slopes, which count places,
    and where the mask cannot be said of these rows."""
    given = arguments(node)
    if cut.dim != _QUERIES or given["slopes"] is not None:
        return None
    query, key = given["query"], given["key"]
    rows, keys = shape(query)[_QUERIES], shape(key)[_QUERIES]
    reader = _Reader(build, given["mask_tensors"], cut, rows, _length_of(rows, keys))
    try:
        said = simplify(reader.read(parse(given["mask"])), cut.length, keys if isinstance(keys, int) else None)
        bias = None if given["bias"] is None else reader.matrix(given["bias"])
    except Refused:
        return None
    numbers = sorted(tensors_of(said))
    mask = str(renumber(said, {number: place for place, number in enumerate(numbers)}))
    tensors = [reader.tensors[number] for number in numbers]
    options = {name: given[name] for name in ("scale", "mask_fill", "empty_rows", "softcap")}
    operands = cut.of(query, build), key, given["value"], tensors, bias, None, given["sinks"]
    return build.call(ops.attention, *operands, mask=mask, **options)


def _length_of(rows: Any, keys: Any) -> Length | None:
    """How many queries there were, in words that hold for fewer; None where only ``query_len`` said it."""
    if isinstance(rows, int):
        return Length(rows)
    return symbol(KEY_LENGTH) if size_equal(rows, keys) else None


@dataclass
class _Reader:
    """Says a predicate of some of ``rows`` queries; ``tensors`` grows by what is read at these."""

    build: Builder
    given: Sequence[fx.Node]
    cut: Cut
    rows: Any
    row_length: Length | None

    def __post_init__(self) -> None:
        self.tensors = list(self.given)

    def read(self, predicate: Predicate) -> Predicate:
        """The predicate of these rows. Raises ``Refused``."""
        return map_atoms(predicate, self._atom)

    def _atom(self, atom: Predicate) -> Predicate:
        match atom:
            case Everything() | Nothing() | Keys() | Lengths() | Heads():
                return atom
            case Prefix(length):
                return Prefix(self._known(length))
            case Band(lower, upper):
                return Band(
                    *(None if bound is None else self._known(bound) + self._first() for bound in (lower, upper))
                )
            case Chunk(size, offset):
                return Chunk(size, self._known(offset) + self._first())
            case Rows(number):
                return Rows(self._vector(number))
            case Same(left, right):
                return Same(self._vector(left), right)
            case Dense(number):
                self.tensors.append(self.matrix(self.given[number]))
                return Dense(len(self.tensors) - 1)
        raise Refused(f"the mask {atom} is not understood for some of its rows")

    def matrix(self, node: fx.Node) -> fx.Node:
        """These rows of what broadcasts to ``[batch, heads, rows, columns]``."""
        if rank(node) < 2 or size_equal(shape(node)[-2], 1):
            return node
        return self.cut.of(node, self.build, -2)

    def _vector(self, number: int) -> int:
        """These rows of what reshapes to ``[batch or 1, rows]``."""
        node = self.given[number]
        if rank(node) == 0 or not size_equal(shape(node)[-1], self.rows):
            raise Refused("the rows of a mask's tensor are not its last dim", node)
        self.tensors.append(self.cut.of(node, self.build, -1))
        return len(self.tensors) - 1

    def _first(self) -> Length:
        """The place of the first of these rows."""
        if self.cut.start >= 0:
            return Length(self.cut.start)
        return self._known(symbol(QUERY_LENGTH)) + self.cut.start

    def _known(self, length: Length) -> Length:
        """A length that counts the queries as they were."""
        if all(name != QUERY_LENGTH for name, _ in length.terms):
            return length
        if self.row_length is None:
            raise Refused("the mask counts all queries")
        return length.substitute({QUERY_LENGTH: self.row_length})
