"""From boolean expressions in mask indices (batch -4, head -3, query -2, key -1) to predicates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.fx import Node

from regraft.ir.mask.expression import (
    ZERO,
    Apply,
    Const,
    Expression,
    Index,
    Load,
    Size,
    build_sum,
    index,
    index_dims,
    linear,
)
from regraft.ir.mask.interpret import Interpreter, fake, same_size, size_expression
from regraft.ir.mask.length import KEY_LENGTH, QUERY_LENGTH, Length, symbol
from regraft.ir.mask.logic import substitute
from regraft.ir.mask.numeric import predicate_on_grid
from regraft.ir.mask.predicate import (
    EVERYTHING,
    NOTHING,
    And,
    Band,
    Chunk,
    Dense,
    Keys,
    Lengths,
    Not,
    Or,
    Predicate,
    Prefix,
    Rows,
    Same,
)

BATCH, HEAD, QUERY, KEY = -4, -3, -2, -1
_FRONT = -5  # the batch, where heads are two dims
_INTEGERS = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_Terms = dict[Expression, int | float]


def _has_third_dim(node: Node) -> bool:
    """Whether a tensor of three dims repeats itself along the first: among the mask's four dims that is no batch."""
    value = fake(node)
    return value is not None and value.dim() == 3 and size_expression(value.shape[0]) is not size_expression(1)


class Unknown(Exception):
    """No predicate and no tensor of the graph holds this expression."""


class Describer:
    """Turns expressions of one mask into predicates, collecting the tensors which they read.

    A mask of scores of five dims, ``[batch, kv_heads, group, queries, keys]``, is read as one of four where it tells
    neither kind of head apart.
    """

    def __init__(
        self, interpreter: Interpreter, query_length: int | torch.SymInt, key_length: int | torch.SymInt
    ) -> None:
        self.interpreter = interpreter
        self.lengths = query_length, key_length
        self.rows, self.columns = size_expression(query_length), size_expression(key_length)
        self.tensors: list[Node] = []
        self._batch_in_front = False  # whether the mask has five dims

    def expression(self, node: Node, reader: Node | None = None) -> Expression:
        """The value of the mask ``node``, which ``fits``, in the mask's four indices (see ``Interpreter``)."""
        expression = self.interpreter.expression(node, reader)
        value = fake(node)
        self._batch_in_front = value is not None and value.dim() == 5
        return substitute(expression, {_FRONT: index(BATCH)}) if self._batch_in_front else expression

    def predicate(self, expression: Expression) -> Predicate:
        """The predicate of a boolean expression; parts which are no atoms become Dense, or Unknown is
        raised."""
        if isinstance(expression, Const):
            return EVERYTHING if expression.value else NOTHING
        kept = len(self.tensors)
        try:
            made = self._structure(expression)
        except Unknown:
            del self.tensors[kept:]
        else:
            held = self._held(expression) if self._reads_numbers(made) else None
            if held is None:
                return made
            del self.tensors[kept:]
            return Dense(self.slot(held))
        if isinstance(self.rows, Const) and isinstance(self.columns, Const):
            proved = predicate_on_grid(expression, int(self.rows.value), int(self.columns.value))
            if proved is not None:
                return proved
        held = self.tensor(expression)
        return (Keys if self._is_of_keys(expression, held) else Dense)(self.slot(held))

    def _is_of_keys(self, expression: Expression, held: Node) -> bool:
        """Whether a node that holds an expression says of each key whether it is seen, by all rows."""
        value = fake(held)
        if value is None or not value.dim() or (value.dim() > 1 and value.shape[-2] != 1) or self._batch_in_front:
            return False
        return index_dims(expression) <= {BATCH, KEY} and size_expression(value.shape[-1]) is self.columns

    def _reads_numbers(self, made: Predicate) -> bool:
        """Whether a predicate is a tensor of numbers that are asked for zero: it takes eight times the memory of the
        answers, too much for a constant of many keys, and is made in every call then."""
        dense = made.operand if isinstance(made, Not) else made
        value = fake(self.tensors[dense.tensor]) if isinstance(dense, Dense) else None
        return value is not None and value.dtype != torch.bool

    def _held(self, expression: Expression) -> Node | None:
        """A node of truth values that holds the expression."""
        return next((node for node in self._nodes(expression) if node.meta["val"].dtype == torch.bool), None)

    def slot(self, node: Node) -> int:
        if node not in self.tensors:
            self.tensors.append(node)
        return self.tensors.index(node)

    def tensor(self, expression: Expression) -> Node:
        """A node which holds the expression and broadcasts to [batch, heads, query length, key length]."""
        node = next(self._nodes(expression), None)
        if node is None:
            raise Unknown
        return node

    def _nodes(self, expression: Expression) -> Iterator[Node]:
        dims = index_dims(expression)
        witnesses = self.interpreter.witnesses(expression)
        if self._batch_in_front:
            witnesses = witnesses + self.interpreter.witnesses(substitute(expression, {BATCH: index(_FRONT)}))
        for node in witnesses:
            if self.fits(node) and (HEAD in dims or not _has_third_dim(node)):
                yield node

    def fits(self, node: Node) -> bool:
        """Whether a tensor may be a mask: it broadcasts to ``[batch, heads, queries, keys]``, or to these with a dim
        of groups, along which, and along heads, it is the same."""
        value = fake(node)
        if value is None or value.dim() > 5:
            return False
        extents = list(reversed(value.shape))
        if len(extents) == 5 and any(not same_size(extent, 1) for extent in extents[2:4]):
            return False
        wanted = zip(extents, reversed(self.lengths), strict=False)
        return all(same_size(extent, 1) or same_size(extent, want) for extent, want in wanted)

    def length(self, expression: Expression) -> Length:
        """An affine size in terms of ``query_len`` and ``key_len`` where it is one, else of its own
        symbols."""
        constant, terms = linear(expression)
        if not isinstance(constant, int):
            raise Unknown
        if not terms:
            return Length(constant)
        columns, rows = linear(self.columns), linear(self.rows)
        gap = linear(build_sum(0, _minus(columns[1], rows[1])))
        for base, name in (
            ((columns[0] - rows[0], gap[1]), symbol(KEY_LENGTH) - symbol(QUERY_LENGTH)),
            (columns, symbol(KEY_LENGTH)),
            (rows, symbol(QUERY_LENGTH)),
        ):
            factor = _multiple(terms, base[1])
            if factor is not None:
                return name.scaled(factor) + (constant - factor * int(base[0]))
        result = Length(constant)
        for term, times in terms.items():
            if not (isinstance(term, Size) and term.positive and term.name.isidentifier() and isinstance(times, int)):
                raise Unknown
            result = result + symbol(term.name).scaled(times)
        return result

    def _structure(self, expression: Expression) -> Predicate:
        match expression:
            case Load():
                return self._truth(expression, expression)
            case Apply(operator="and", arguments=parts):
                return And(tuple(self.predicate(part) for part in parts))
            case Apply(operator="or", arguments=parts):
                return Or(tuple(self.predicate(part) for part in parts))
            case Apply(operator="not", arguments=(inner,)):
                return Not(self.predicate(inner))
            case Apply(operator="le", arguments=(difference,)):
                return self._at_most(difference)
            case Apply(operator="eq", arguments=(difference,)):
                return self._equal(difference)
            case Apply(operator="float_eq", arguments=(Load() as tensor, Const(value=0))):
                return Not(self._truth(expression, tensor))
        raise Unknown

    def _truth(self, expression: Expression, tensor: Load) -> Predicate:
        """``t != 0`` of a tensor read by batch and key, or by batch and query."""
        dims = index_dims(tensor)
        for dim, atom in ((KEY, Keys), (QUERY, Rows)):
            if dim in dims and dims <= {BATCH, dim}:
                return atom(self.slot(self._vector(tensor, dim)))
        return Dense(self.slot(self.tensor(tensor)))

    def _vector(self, tensor: Load, dim: int) -> Node:
        """A node which reshapes to [batch or 1, length of ``dim``] and holds ``tensor``."""
        extent = self.lengths[1 if dim == KEY else 0]
        value = fake(tensor.node)
        used = [place for place in tensor.indices if place is not ZERO]
        if value is not None and _in_order(used):
            whole = all(
                (place is not used[-1] or same_size(size, extent)) and (place is not ZERO or size == 1)
                for size, place in zip(value.shape, tensor.indices, strict=True)
            )
            if whole:
                return tensor.node
        for node in self.interpreter.witnesses(tensor):
            found = fake(node)
            assert found is not None
            if found.dim() >= -dim and same_size(found.shape[dim], extent):
                return node
        raise Unknown

    def _at_most(self, difference: Expression) -> Predicate:
        key, query, rest, others = _parts(difference)
        if not others:
            match key, query:
                case 1, -1:
                    return Band(None, -self.length(rest))
                case -1, 1:
                    return Band(self.length(rest), None)
                case 1, 0:
                    return Prefix(-self.length(rest) + 1)
                case -1, 0:
                    return Not(Prefix(self.length(rest)))
        match key, query, list(others.items()):
            case 1, 0, [(Load() as tensor, -1)] if rest == _ONE:
                return Lengths(self.slot(self._per_batch(tensor)))
            case -1, 0, [(Load() as tensor, 1)] if rest is ZERO:
                return Not(Lengths(self.slot(self._per_batch(tensor))))
        chunks = self._chunks(others) if key == query == 0 else None
        if chunks is not None:
            atom, sign = chunks
            # k//n <= q//n: the same chunk or an earlier key; k//n < q//n: an earlier key of another chunk.
            order = Band(None, atom.offset) if sign > 0 else Band(atom.offset, None)
            if rest is ZERO:
                return Or((atom, order))
            if rest is _ONE:
                return And((Not(atom), order))
        raise Unknown

    def _equal(self, difference: Expression) -> Predicate:
        key, query, rest, others = _parts(difference)
        if not others:
            if key and key == -query and abs(key) == 1:
                offset = self.length(rest).scaled(-int(key))
                return Band(offset, offset)
            if abs(key) == 1 and not query:
                place = self.length(rest).scaled(-int(key))
                return And((Prefix(place + 1), Not(Prefix(place))))
        if key or query or rest is not ZERO:
            raise Unknown
        chunks = self._chunks(others)
        if chunks is not None:
            return chunks[0]
        match list(others.items()):
            case [(Load() as tensor, _)]:
                return Not(self._truth(tensor, tensor))
            case [(Load() as left, 1), (Load() as right, -1)]:
                if KEY in index_dims(left):
                    left, right = right, left
                if {QUERY} <= index_dims(left) <= {BATCH, QUERY} and {KEY} <= index_dims(right) <= {
                    BATCH,
                    KEY,
                }:
                    query_tensor = self.slot(self._vector(left, QUERY))
                    return Same(query_tensor, self.slot(self._vector(right, KEY)))
        raise Unknown

    def _per_batch(self, tensor: Load) -> Node:
        used = [place for place in tensor.indices if place is not ZERO]
        value = fake(tensor.node)
        assert value is not None
        full = all(place is not ZERO or size == 1 for size, place in zip(value.shape, tensor.indices, strict=True))
        if full and len(used) <= 1 and index_dims(tensor) <= {BATCH} and tensor.dtype in _INTEGERS and _in_order(used):
            return tensor.node
        raise Unknown

    def _chunks(self, others: _Terms) -> tuple[Chunk, int] | None:
        """``key // size - (query + offset) // size`` or its negative: the atom of equality, and the key's
        sign."""
        match list(others.items()):
            case [
                (Apply(operator="floordiv", arguments=(left, Const(value=size))), (1 | -1) as sign),
                (Apply(operator="floordiv", arguments=(right, Const(value=other_size))), other_sign),
            ] if size == other_size and sign == -other_sign and size > 0:
                if not (isinstance(left, Index) and left.dim == KEY):
                    left, right, sign = right, left, -sign
                key, query, rest, remaining = _parts(right)
                if isinstance(left, Index) and left.dim == KEY and (key, query) == (0, 1) and not remaining:
                    return Chunk(int(size), self.length(rest)), int(sign)
        return None


_ONE = size_expression(1)


def _parts(difference: Expression) -> tuple[int | float, int | float, Expression, _Terms]:
    """Coefficients of key and query, the sum of constant and sizes, and the other terms."""
    constant, terms = linear(difference)
    sizes: _Terms = {term: factor for term, factor in terms.items() if isinstance(term, Size)}
    key = next((f for t, f in terms.items() if isinstance(t, Index) and t.dim == KEY), 0)
    query = next((f for t, f in terms.items() if isinstance(t, Index) and t.dim == QUERY), 0)
    plain = {t for t in terms if isinstance(t, Index) and t.dim in (KEY, QUERY)}
    others = {term: factor for term, factor in terms.items() if term not in sizes and term not in plain}
    return key, query, build_sum(constant, sizes), others


def _minus(left: _Terms, right: _Terms) -> _Terms:
    result = dict(left)
    for term, factor in right.items():
        result[term] = result.get(term, 0) - factor
    return result


def _multiple(terms: _Terms, base: _Terms) -> int | None:
    """The integer m with ``terms == m * base``, or None."""
    if not base or terms.keys() != base.keys():
        return None
    first = next(iter(base))
    factor = int(terms[first] // base[first])
    return factor if all(terms[term] == factor * base[term] for term in base) else None


def _in_order(places: list[Expression]) -> bool:
    dims = [place.dim for place in places if isinstance(place, Index)]
    return len(dims) == len(places) and all(left < right for left, right in pairwise(dims))
