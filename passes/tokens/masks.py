"""The mask of an attention over fewer tokens: the same predicate, said of the tokens that stay.

What is said of a token (padding, document) is read at the tokens that stay. What is said of places holds where order
alone matters (causal); else it is computed from the places that the tokens had at first, as a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir.mask import (
    CAUSAL,
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
)
from regraft.ir.mask.predicate import map_atoms
from regraft.ir.nodes import Builder, rank, shape, size_equal
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Layout, Span
from regraft.passes.tokens.stages import Stages

aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """Rows or columns of a mask: the tokens and their stage, or no tokens of the walk (``span`` None)."""

    span: Span | None
    stage: int
    length: Any


@dataclass
class Reader:
    """Rewrites one mask. ``layout`` is ``[batch, heads, rows, columns]`` of the scores; ``tensors`` are those that the
    new predicate reads."""

    build: Builder
    stages: Stages
    sources: Sequence[fx.Node]
    layout: Layout
    rows: Side
    columns: Side
    tensors: list[fx.Node] = field(default_factory=list)

    def read(self, predicate: Predicate) -> Predicate:
        """The predicate over the tokens that stay. Raises ``Refused``."""
        return map_atoms(predicate, self._atom)

    def _atom(self, atom: Predicate) -> Predicate:
        match atom:
            case Everything() | Nothing():
                return atom
            case Keys(number):
                return Keys(self._slot(self._vector(number, self.columns)))
            case Rows(number):
                return Rows(self._slot(self._vector(number, self.rows)))
            case Same(left, right):
                return Same(self._slot(self._vector(left, self.rows)), self._slot(self._vector(right, self.columns)))
            case Dense(number):
                return Dense(self._slot(self.matrix(self.sources[number])))
        return self._of_places(atom)

    def _of_places(self, predicate: Predicate) -> Predicate:
        """Atoms over indices alone."""
        if predicate == CAUSAL and self.rows == self.columns:
            return predicate  # the tokens that stay keep their order
        match predicate:
            case Prefix(length):
                inside = self.build.call(aten.lt.Scalar, self._places(self.columns), self._number(length))
                return Keys(self._slot(inside))
            case Lengths(number):
                bound = self.build.call(aten.reshape.default, self.sources[number], [-1, 1])
                return Keys(self._slot(self.build.call(aten.lt.Tensor, self._places(self.columns), bound)))
            case Band(lower, upper):
                difference = self.distance()
                parts = []
                if lower is not None:
                    parts.append(self.build.call(aten.ge.Scalar, difference, self._number(lower)))
                if upper is not None:
                    parts.append(self.build.call(aten.le.Scalar, difference, self._number(upper)))
                whole = parts[0] if len(parts) == 1 else self.build.call(aten.logical_and.default, *parts)
                return Dense(self._slot(self._with_heads(whole)))
            case Chunk(size, offset):
                row, column = self._grid()
                shifted = self.build.call(aten.add.Tensor, row, self._number(offset))
                chunks = [
                    self.build.call(aten.div.Tensor_mode, side, size, rounding_mode="floor")
                    for side in (shifted, column)
                ]
                return Dense(self._slot(self._with_heads(self.build.call(aten.eq.Tensor, *chunks))))
        raise Refused(f"the mask {predicate} is not understood for fewer tokens")

    def distance(self) -> fx.Node:
        """``key - query`` in places that the tokens had at first, ``[batch or 1, rows, columns]``."""
        row, column = self._grid()
        return self.build.call(aten.sub.Tensor, column, row)

    def matrix(self, node: fx.Node) -> fx.Node:
        """What broadcasts to ``[batch, heads, rows, columns]``, read at the rows and columns that stay."""
        for dim, side in ((-2, self.rows), (-1, self.columns)):
            if side.span is None or rank(node) < -dim or size_equal(shape(node)[dim], 1):
                continue
            kept = self._axes(node, dim, side.span)
            node = self.stages.bring(self.build, node, kept, (0, side.stage), self._axes_of(dim, side.span), False)
        return node

    def _axes(self, node: fx.Node, dim: int, span: Span) -> Layout:
        """The layout of a matrix of which ``dim`` holds the tokens at their first stage."""
        sizes = shape(node)
        result: list[Any] = []
        for place, size in zip(range(-len(sizes), 0), sizes, strict=True):
            batch = place == -4 and not size_equal(size, 1)
            own = (span,) if place == dim else self.layout[0] if batch else ()
            result.append(own or (() if size_equal(size, 1) else (size,)))
        return tuple(result)

    def _axes_of(self, dim: int, span: Span) -> Layout:
        """The target of such a matrix: the batch in front."""
        target: list[Any] = [self.layout[0], (), (), ()]
        target[dim] = (span,)
        return tuple(target)

    def _vector(self, number: int, side: Side) -> fx.Node:
        """A tensor of ``[batch or 1, length]``, in whatever shape it comes, at the tokens that stay."""
        node = self.sources[number]
        if side.span is None:
            return node
        flat = self.build.call(aten.reshape.default, node, [-1, side.length])
        same = size_equal(shape(flat)[0], 1)
        layout: Layout = (() if same else self.layout[0], (side.span,))
        return self.stages.bring(self.build, flat, layout, (0, side.stage), (self.layout[0], (side.span,)), False)

    def _places(self, side: Side) -> fx.Node:
        if side.span is not None:
            places = self.stages.positions(self.build, side.stage, side.span)
            return self.build.call(aten.sub.Tensor, places, side.span.start) if side.span.start else places
        places = self.build.call(aten.arange.default, side.length, device=self.stages.device, pin_memory=False)
        return self.build.call(aten.unsqueeze.default, places, -2)

    def _grid(self) -> tuple[fx.Node, fx.Node]:
        row = self.build.call(aten.unsqueeze.default, self._places(self.rows), -1)
        return row, self.build.call(aten.unsqueeze.default, self._places(self.columns), -2)

    def _with_heads(self, matrix: fx.Node) -> fx.Node:
        return self.build.call(aten.unsqueeze.default, matrix, -3)

    def _number(self, length: Length) -> int:
        """A bound in terms of the lengths before anything was removed."""
        if not (isinstance(self.rows.length, int) and isinstance(self.columns.length, int)):
            raise Refused("the bounds of the mask depend on a length that is a symbol")
        try:
            return length.evaluate({QUERY_LENGTH: self.rows.length, KEY_LENGTH: self.columns.length})
        except KeyError as missing:
            raise Refused(f"a bound of the mask depends on {missing}, which is no length of the tokens") from missing

    def _slot(self, node: fx.Node) -> int:
        if node not in self.tensors:
            self.tensors.append(node)
        return self.tensors.index(node)
