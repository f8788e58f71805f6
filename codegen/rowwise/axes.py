"""Which dims of the values of a region run over rows, and which over the columns of a row.

A region has one set of row axes. Each dim of each value is one of them, or the columns, or has size one; a value may
lack axes (a weight has the columns alone, a mean the rows alone). Permuted values show that a dim is no fixed axis:
labels are found by unification along the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from regraft.codegen.rowwise.operators import Kind, Step, step_of
from regraft.ir.nodes import concrete, shape, size_equal

#: Labels beside the numbers of axes: the columns, and a dim of size one.
COLUMN, UNIT = -1, None
Labels = tuple[int | None, ...]


class Unfusable(ValueError):
    """A call that no row-wise kernel holds, or that fits no region with others; the message says why."""


@dataclass
class RowAxes:
    """Labels of the values that calls make, and of what they read from outside. ``sizes`` has the size of each axis,
    and ``axes`` those of a value's labels."""

    labels: dict[fx.Node, Labels] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, fx.Node], list[Labels]] = field(default_factory=dict)
    sizes: dict[int, Any] = field(default_factory=dict)
    _parent: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def of(nodes: Iterable[fx.Node]) -> RowAxes:
        """Labels of calls in topological order; raises ``Unfusable`` where they do not fit together."""
        axes = RowAxes()
        for node in nodes:
            axes._add(node)
        axes._join_readers()
        axes.labels = {node: axes._resolved(node, labels) for node, labels in axes.labels.items()}
        axes.reads = {key: [axes._resolved(key[1], labels) for labels in uses] for key, uses in axes.reads.items()}
        axes.sizes = {axis: size for axis, size in axes.sizes.items() if axes._root(axis) == axis}
        return axes

    def axes(self, node: fx.Node) -> set[int]:
        """The row axes that a value has."""
        return {label for label in self.labels[node] if label is not None and label != COLUMN}

    def _add(self, node: fx.Node) -> None:
        step = step_of(node)
        if isinstance(step, str):
            raise Unfusable(step)
        self.labels[node] = _RULES[step.kind](self, node, step)

    def _join_readers(self) -> None:
        """Calls that have nothing in common but what they read run over the same rows."""
        first: dict[fx.Node, tuple[fx.Node, Labels]] = {}
        for (node, operand), uses in self.reads.items():
            for labels in uses:
                held = first.setdefault(operand, (node, labels))[1]
                numbers = [{self._root(n) for n in use if n is not None and n != COLUMN} for use in (held, labels)]
                if len(held) == len(labels) and numbers[0].isdisjoint(numbers[1]):
                    for one, other in zip(held, labels, strict=True):
                        if one is not None:
                            self._unify(node, one, other)

    def _pointwise(self, node: fx.Node, step: Step) -> Labels:
        """Dims are aligned from the end, as broadcasting does."""
        labels = [self._result(node, step, place) for place in range(-len(_result_shape(node)), 0)]
        for operand in step.tensors:
            self._read(node, operand, labels)
        return tuple(labels)

    def _result(self, node: fx.Node, step: Step, place: int) -> int | None:
        """The label of a dim of the result, counted from the end: that of the operands that have it, else a new one."""
        sizes = _result_shape(node)
        if _is_one(sizes[place]):
            return UNIT
        found = self._joined(node, step.tensors, place)
        return self._fresh(sizes, place) if found is None else found

    def _joined(self, node: fx.Node, operands: Sequence[fx.Node], place: int) -> int | None:
        found: int | None = None
        for operand in operands:
            held = self.labels.get(operand)
            if held is None or len(held) < -place or held[place] is UNIT:
                continue
            found = held[place] if found is None else self._unify(node, found, held[place])
        return found

    def _columns(self, node: fx.Node, step: Step) -> Labels:
        """Operands that differ in the last dim alone: pieces of a concatenation, a slice, a repetition."""
        if _is_one(_result_shape(node)[-1]):
            raise Unfusable(f"{node.name} has a single column")
        labels = [*(self._result(node, step, place) for place in range(-len(_result_shape(node)), -1)), COLUMN]
        for operand in step.tensors:
            self._read(node, operand, labels)
            if self.labels.get(operand, (COLUMN,))[-1] not in (COLUMN, UNIT):
                raise Unfusable(f"{node.name} works on the columns of what has none")
        return tuple(labels)

    def _reduced(self, node: fx.Node, step: Step) -> Labels:
        operand = step.tensors[0]
        held = self.labels.get(operand)
        if held is None:
            sizes = shape(operand)
            held = (*(UNIT if _is_one(sizes[p]) else self._fresh(sizes, p) for p in range(-len(sizes), -1)), COLUMN)
            self._read(node, operand, held)
        if held[-1] != COLUMN:
            raise Unfusable(f"{node.name} reduces a dim that is no row of columns")
        return (*held[:-1], UNIT) if step.keeps else held[:-1]

    def _permuted(self, node: fx.Node, step: Step) -> Labels:
        operand = step.tensors[0]
        return tuple(self._held(node, operand)[dim] for dim in step.dims)

    def _reshaped(self, node: fx.Node, step: Step) -> Labels:
        """Dims of size one come and go; the others stay in order."""
        operand = step.tensors[0]
        held = [
            label for label, size in zip(self._held(node, operand), shape(operand), strict=True) if not _is_one(size)
        ]
        kept = iter(held)
        labels = tuple(UNIT if _is_one(size) else next(kept) for size in _result_shape(node))
        if COLUMN in labels[:-1]:
            raise Unfusable(f"{node.name} moves the columns")
        return labels

    def _part(self, node: fx.Node, step: Step) -> Labels:
        """One of the values that an operator gives."""
        if step.tensors[0] not in self.labels:
            raise Unfusable(f"{node.name} is a part of what lies outside")
        return self.labels[step.tensors[0]]

    def _held(self, node: fx.Node, operand: fx.Node) -> Labels:
        held = self.labels.get(operand)
        if held is not None:
            return held
        sizes = shape(operand)
        labels = tuple(UNIT if _is_one(sizes[p]) else self._fresh(sizes, p) for p in range(-len(sizes), 0))
        self._read(node, operand, labels)
        return labels

    def _read(self, node: fx.Node, operand: fx.Node, labels: Sequence[int | None]) -> None:
        """What a call reads from outside takes the labels of the dims that its own meet."""
        if operand in self.labels:
            return
        sizes = shape(operand)
        own = tuple(UNIT if _is_one(sizes[p]) else labels[p] for p in range(-len(sizes), 0))
        uses = self.reads.setdefault((node, operand), [])
        if own not in uses:
            uses.append(own)

    def _fresh(self, sizes: Sequence[Any], place: int) -> int:
        if place == -1:
            return COLUMN
        axis = len(self._parent)
        self._parent[axis], self.sizes[axis] = axis, sizes[place]
        return axis

    def _unify(self, node: fx.Node, left: int, right: int | None) -> int:
        assert right is not None
        if COLUMN in (left, right):
            if left != right:
                raise Unfusable(f"{node.name} meets columns with rows")
            return COLUMN
        one, other = sorted((self._root(left), self._root(right)))
        if one != other and not size_equal(self.sizes[one], self.sizes[other]):
            raise Unfusable(f"{node.name} meets rows of different sizes")
        self._parent[other] = one
        return one

    def _root(self, axis: int) -> int:
        while self._parent[axis] != axis:
            axis = self._parent[axis]
        return axis

    def _resolved(self, node: fx.Node, labels: Labels) -> Labels:
        found = tuple(label if label is None or label == COLUMN else self._root(label) for label in labels)
        named = [label for label in found if label is not None]
        if len(set(named)) < len(named):
            raise Unfusable(f"two dims of {node.name} run over the same rows")
        return found


_RULES = {
    Kind.POINTWISE: RowAxes._pointwise,
    Kind.COLUMNS: RowAxes._columns,
    Kind.REDUCTION: RowAxes._reduced,
    Kind.PERMUTE: RowAxes._permuted,
    Kind.RESHAPE: RowAxes._reshaped,
    Kind.PART: RowAxes._part,
}


def _result_shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a call's value; that of the first where it has several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def memory_order(node: fx.Node) -> tuple[int, ...]:
    """The dims of a value from the outermost in memory to the innermost, as the graph lays it out."""
    value = node.meta["val"]
    strides = [concrete(stride) for stride in value.stride()]
    sizes = [concrete(size) for size in value.shape]
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    return tuple(order) if all(strides[dim] or sizes[dim] == 1 for dim in order) else tuple(range(len(strides)))
