"""Which columns of a row are computed together.

Slices and concatenations cut rows into pieces. A value is computed piece by piece, such that within a piece every
concatenation is one of its parts, and every read is of columns at even steps: rotary embedding then works on halves
(or on every second column), and no column is chosen by a condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from regraft.codegen.rowwise.operators import Kind, interleave, product, step_of
from regraft.ir.nodes import arguments, shape

aten = torch.ops.aten
Classes = NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Span:
    """Columns ``start``, ``start + step``… , ``length`` of them."""

    start: int
    step: int
    length: int

    def of(self, columns: Span) -> Span:
        """The same places of other columns."""
        return Span(columns.start + self.start * columns.step, columns.step * self.step, self.length)


def slice_span(node: fx.Node) -> Span:
    """Which columns of its operand a slice takes."""
    given = arguments(node)
    start, end, step = slice(given["start"], given["end"], given["step"]).indices(shape(given["self"])[-1])
    return Span(start, step, len(range(start, end, step)))


def spans_of(graph: fx.Graph, wide: set[fx.Node]) -> dict[fx.Node, tuple[Span, ...]]:
    """The pieces of each value that has columns (``wide``); values of one length are cut alike."""
    classes: dict[fx.Node, Classes] = {}
    for node in graph.nodes:
        if node in wide:
            classes[node] = _classes(node, classes)
    cuts: dict[int, tuple[Span, ...]] = {}
    for length in {len(held) for held in classes.values()}:
        together = np.stack([held for held in classes.values() if len(held) == length])
        cuts[length] = _spans(np.unique(together, axis=1, return_inverse=True)[1].reshape(-1))
    return {node: cuts[len(held)] for node, held in classes.items()}


def _classes(node: fx.Node, classes: dict[fx.Node, Classes]) -> Classes:
    """A number for each column, the same where columns are computed together."""
    length = int(shape(node)[-1])
    if node.op == "placeholder" or node.target is product:
        return np.zeros(length, np.int64)
    step = step_of(node)
    assert not isinstance(step, str), step
    if step.kind is not Kind.COLUMNS:
        held = [classes[operand] for operand in step.tensors if operand in classes and len(classes[operand]) == length]
        return _refined(held, length)
    operands = [classes[operand] for operand in step.tensors]
    if node.target is aten.cat.default:
        return _numbered(operands)
    if node.target is interleave:
        out = np.empty(length, np.int64)
        numbered = _numbered(operands)
        out[0::2], out[1::2] = numbered[: length // 2], numbered[length // 2 :]
        return out
    if node.target is aten.repeat_interleave.self_int:
        return np.repeat(operands[0] * 2, 2) + np.arange(length) % 2
    span = slice_span(node)
    return operands[0][span.start :: span.step][: span.length]


def _numbered(pieces: list[Classes]) -> Classes:
    out, first = [], 0
    for piece in pieces:
        out.append(piece + first)
        first += int(piece.max()) + 1
    return np.concatenate(out)


def _refined(held: list[Classes], length: int) -> Classes:
    if not held:
        return np.zeros(length, np.int64)
    if len(held) == 1:
        return held[0]
    return np.unique(np.stack(held), axis=1, return_inverse=True)[1].reshape(-1)


def _spans(classes: Classes) -> tuple[Span, ...]:
    """Columns of one class at even steps, as few pieces as there are."""
    found: list[Span] = []
    for number in np.unique(classes):
        places = np.flatnonzero(classes == number)
        while len(places):
            steps = np.diff(places)
            even = len(places) if len(places) < 2 else 1 + _leading(steps == steps[0])
            found.append(Span(int(places[0]), int(steps[0]) if even > 1 else 1, int(even)))
            places = places[even:]
    return tuple(sorted(found))


def _leading(flags: Any) -> int:
    return len(flags) if flags.all() else int(np.argmin(flags))
