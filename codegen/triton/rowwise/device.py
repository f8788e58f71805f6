"""The body of a row-wise kernel as text: values are written where they are first needed, piece by piece of the columns.

Short rows are held whole: each value of a piece is one tile in registers. Longer rows are gone through in chunks, once
for each level of reductions and once for the results; what lies between is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.axes import COLUMN, Labels, RowAxes, Unfusable
from regraft.codegen.rowwise.operators import Kind, interleave, step_of
from regraft.codegen.rowwise.primitives import COMPARISONS, REDUCTIONS, operator_word, pointwise
from regraft.codegen.triton.rowwise.columns import Span, slice_span, spans_of
from regraft.codegen.triton.rowwise.helpers import HELPERS
from regraft.codegen.triton.rowwise.pointwise import TEXTS
from regraft.ir.nodes import arguments, dtype, shape

aten = torch.ops.aten
#: Names of the template, and of builtins.
_RESERVED = ("tl", "triton", "torch", "places", "rows", "kept", "lanes", "inside", "first", "row_count", "sum", "max")
_HALVES = (torch.float16, torch.bfloat16)
_FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class View:
    """A tensor of the region as the kernel reads or writes it: which of its dims are rows and columns."""

    name: str
    node: fx.Node
    labels: Labels

    @property
    def wide(self) -> bool:
        """Whether it has columns."""
        return COLUMN in self.labels


@dataclass
class Body:
    """A kernel's statements. ``lengths`` are the numbers of columns that pieces have, ``helpers`` the device functions
    that are called, ``rounds`` the element types that values are rounded to."""

    lines: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    rounds: set[torch.dtype] = field(default_factory=set)
    lengths: set[int] = field(default_factory=set)


class DeviceText:
    """Writes the statements of a region. ``chunked``: rows are gone through in chunks of ``block_columns``."""

    #: The names of a tile's sizes.
    block_rows, block_columns = "BLOCK_ROWS", "BLOCK_COLUMNS"

    def __init__(
        self,
        graph: fx.Graph,
        axes: RowAxes,
        names: dict[tuple[fx.Node, Labels], str],
        chunked: bool,
        reserved: Iterable[str] = (),
    ) -> None:
        self.graph, self.axes, self.names, self.chunked = graph, axes, names, chunked
        self.body = Body()
        calls = [node for node in graph.nodes if node.op == "call_function"]
        labels = {node: axes.labels[node] for node in calls}
        self._wide = {node for node, held in labels.items() if held and held[-1] == COLUMN}
        self._wide |= {node for (_, node), uses in axes.reads.items() for use in uses if use and use[-1] == COLUMN}
        self.spans = spans_of(graph, self._wide)
        self._levels = self._count_levels(calls)
        self._made: dict[tuple[Any, ...], str] = {}
        self._used = {*HELPERS, *names.values(), *reserved, *_RESERVED}
        self._indent = 1
        self._outer: dict[tuple[Any, ...], str] = {}

    @property
    def levels(self) -> int:
        """How many reductions stand one behind the other."""
        return max(self._levels.values(), default=0)

    def write(self, outputs: Iterable[View]) -> Body:
        """The statements from the reads to the stores of ``outputs``."""
        stored = list(outputs)
        if not self.chunked:
            for view in stored:
                for span in self._pieces(view):
                    self._store(view, span)
            return self.body
        for level in range(1, self.levels + 1):
            self._reductions(level)
        self._stores(stored)
        return self.body

    def _pieces(self, view: View) -> Iterable[Span | None]:
        return self.spans[view.node] if view.wide else (None,)

    # Chunks

    def _reductions(self, level: int) -> None:
        """The reductions of a level: a loop over chunks for each length of their pieces."""
        found = [n for n in self.graph.nodes if self._levels.get(n) == level and self._is_reduction(n)]
        self._settle(level - 1)
        parts: dict[fx.Node, list[str]] = {node: [] for node in found}
        loops: dict[int, list[tuple[fx.Node, Span, str]]] = {}
        for node in found:
            for span in self.spans[_operand(node)]:
                name = self._name(f"{node.name}_part")
                loops.setdefault(span.length, []).append((node, span, name))
                parts[node].append(name)
        for length, sums in sorted(loops.items()):
            for node, _, name in sums:
                self._line(f"{name} = tl.full(({self.block_rows}, {self.block_columns}), {_start(node)}, tl.float32)")
            self._open_loop(length)
            for node, span, name in sums:
                held = self._masked(node, span)
                self._line(f"{name} = {self._accumulated(node, name, held)}")
            self._close_loop()
        for node in found:
            texts = [self._over_columns(node, name) for name in parts[node]]
            self._define((node, None), node, self._combined(node, texts))

    def _settle(self, level: int) -> None:
        """Numbers of rows that are known behind a level are written outside the loops that read them."""
        for node in self.graph.nodes:
            if node in self._levels and node not in self._wide and self._levels[node] <= level:
                self._value(node, None)

    def _stores(self, outputs: list[View]) -> None:
        self._settle(self.levels)
        for view in outputs:
            if not view.wide:
                self._store(view, None)
        loops: dict[int, list[tuple[View, Span]]] = {}
        for view in outputs:
            for span in self.spans[view.node] if view.wide else ():
                loops.setdefault(span.length, []).append((view, span))
        for length, stores in sorted(loops.items()):
            self._open_loop(length)
            for view, span in stores:
                self._store(view, span)
            self._close_loop()

    @property
    def spread(self) -> int | None:
        """The number of columns, where chunks are programs of their own: nothing is reduced, and pieces are alike."""
        lengths = {span.length for spans in self.spans.values() for span in spans}
        return max(lengths) if self.chunked and not self.levels and len(lengths) == 1 else None

    def _open_loop(self, length: int) -> None:
        self._outer = dict(self._made)
        if self.spread is not None:
            self._line(f"first = tl.program_id(1) * {self.block_columns}")
        else:
            self._line(f"for first in range(0, {length}, {self.block_columns}):")
            self._indent += 1
        self._line(f"lanes = first + tl.arange(0, {self.block_columns})[None, :]")
        self._line(f"inside = lanes < {length}")
        self._made["lanes", length], self._made["inside", length] = "lanes", "inside"

    def _close_loop(self) -> None:
        self._indent = 1
        self._made = self._outer

    # Values

    def _value(self, node: fx.Node, span: Span | None, reader: fx.Node | None = None) -> str:
        """The name of a value at some columns (None: a number for each row, or one for all)."""
        if node not in self._wide:
            span = None
        if node.op == "placeholder":
            return self._loaded(node, span, reader)
        if (node, span) not in self._made:
            self._compute(node, span)
        return self._made[node, span]

    def _compute(self, node: fx.Node, span: Span | None) -> None:
        step = step_of(node)
        assert not isinstance(step, str), step
        if step.moves and step.kind is not Kind.COLUMNS:
            self._made[node, span] = self._value(step.tensors[0], span, node)
        elif step.kind is Kind.COLUMNS:
            assert span is not None
            self._made[node, span] = self._moved(node, span)
        elif self._is_reduction(node):
            pieces = self.spans[_operand(node)]
            texts = [self._over_columns(node, self._masked(node, piece)) for piece in pieces]
            if len(texts) > 1:
                texts = [self._part(node, text) for text in texts]
            self._define((node, None), node, self._combined(node, texts))
        else:
            self._pointwise(node, span)

    def _moved(self, node: fx.Node, span: Span) -> str:
        """A value at columns of a slice, a concatenation or a repetition: that of an operand at other columns."""
        given = arguments(node)
        if node.target is aten.slice.Tensor:
            return self._value(given["self"], span.of(slice_span(node)), node)
        if node.target is aten.repeat_interleave.self_int:
            return self._value(given["self"], Span(span.start // 2, max(1, span.step // 2), span.length), node)
        if node.target is interleave:
            return self._value(
                node.args[span.start % 2],  # type: ignore[arg-type]
                Span(span.start // 2, max(1, span.step // 2), span.length),
                node,
            )
        first = 0
        for piece in given["tensors"]:
            length = int(shape(piece)[-1])
            if span.start < first + length:
                return self._value(piece, Span(span.start - first, span.step, span.length), node)
            first += length
        raise AssertionError(f"{node.name} has no columns {span}")

    def _pointwise(self, node: fx.Node, span: Span | None) -> None:
        found = pointwise(node)
        assert found is not None
        primitive, operands = found
        word = operator_word(node.target)
        kind = self._common(node, operands) if word in COMPARISONS else dtype(node)
        texts = [
            self._operand(node, operand, span, None if word == "where" and place == 0 else kind)
            for place, operand in enumerate(operands)
        ]
        if word == "masked_fill":
            texts[1] = self._operand(node, operands[1], span, None)
        template, helpers = TEXTS[primitive.name]
        self.body.helpers |= set(helpers)
        text = template.format(*texts)
        tensors = [dtype(operand) for operand in operands if isinstance(operand, fx.Node)]
        same = len(tensors) == len(operands) and set(tensors) <= {dtype(node), torch.bool}
        self._define((node, span), node, text, exact=primitive.exact and same)

    def _operand(self, node: fx.Node, operand: Any, span: Span | None, kind: torch.dtype | None) -> str:
        """An operand in the type that its call computes in (None: as it is)."""
        if not isinstance(operand, fx.Node):
            return _number(operand, kind is None or kind.is_floating_point)
        text, held = self._value(operand, span, node), dtype(operand)
        if kind is None or kind == held:
            return text
        if kind.is_floating_point:
            if not held.is_floating_point:
                return f"{text}.to(tl.float32)"
            narrows = kind in _HALVES and held == torch.float32 and not _converts(node)
            return self._rounded(text, kind) if narrows else text
        if held.is_floating_point or kind == torch.bool:
            return text
        return f"{text}.to({_device_type(kind)})"

    def _common(self, node: fx.Node, operands: list[Any]) -> torch.dtype:
        kinds = [operand.meta["val"] if isinstance(operand, fx.Node) else operand for operand in operands]
        return torch.result_type(kinds[0], kinds[-1]) if len(kinds) > 1 else kinds[0].dtype

    def _define(self, key: tuple[Any, ...], node: fx.Node, text: str, exact: bool = False) -> None:
        kind = dtype(node)
        if kind in _HALVES and not exact:
            text = self._rounded(text, kind)
        elif kind == torch.bool and _converts(node):
            text = f"{text} != 0"
        elif not kind.is_floating_point and kind != torch.bool:
            text = f"({text}).to({_device_type(kind)})"
        if text.isidentifier():
            self._made[key] = text
            return
        name = self._name(node.name)
        self._line(f"{name} = {text}")
        self._made[key] = name

    def _rounded(self, text: str, kind: torch.dtype) -> str:
        self.body.rounds.add(kind)
        return f"as_{str(kind).removeprefix('torch.')}({text})"

    # Reductions

    def _is_reduction(self, node: fx.Node) -> bool:
        return operator_word(node.target) in REDUCTIONS

    def _masked(self, node: fx.Node, span: Span) -> str:
        """A piece of what a reduction reads, with what it starts from behind the end."""
        value, inside = self._value(_operand(node), span, node), self._inside(span.length)
        return f"tl.where({inside}, {value}, {_start(node)})" if inside else value

    def _accumulated(self, node: fx.Node, name: str, held: str) -> str:
        word = operator_word(node.target)
        if word in ("sum", "mean"):
            return f"{name} + {held}"
        return f"tl.{'maximum' if word == 'amax' else 'minimum'}({name}, {held}, propagate_nan=tl.PropagateNan.ALL)"

    def _over_columns(self, node: fx.Node, text: str) -> str:
        word = operator_word(node.target)
        if word in ("sum", "mean"):
            return f"tl.sum({text}, 1, keep_dims=True)"
        helper = "row_max" if word == "amax" else "row_min"
        self.body.helpers.add(helper)
        return f"{helper}({text})"

    def _part(self, node: fx.Node, text: str) -> str:
        """The name of a reduction of one piece."""
        name = self._name(f"{node.name}_part")
        self._line(f"{name} = {text}")
        return name

    def _combined(self, node: fx.Node, texts: list[str]) -> str:
        word = operator_word(node.target)
        if word in ("sum", "mean"):
            total = " + ".join(texts)
            if word == "sum":
                return total
            return f"{f'({total})' if len(texts) > 1 else total} / {float(shape(_operand(node))[-1])}"
        text, *others = texts
        for other in others:
            function = "maximum" if word == "amax" else "minimum"
            text = f"tl.{function}({text}, {other}, propagate_nan=tl.PropagateNan.ALL)"
        return text

    def _count_levels(self, calls: list[fx.Node]) -> dict[fx.Node, int]:
        levels: dict[fx.Node, int] = {}
        for node in calls:
            below = max((levels.get(operand, 0) for operand in node.all_input_nodes), default=0)
            levels[node] = below + self._is_reduction(node)
        return levels

    # Memory

    def _loaded(self, node: fx.Node, span: Span | None, reader: fx.Node | None) -> str:
        labels = next(
            use for (by, read), uses in self.axes.reads.items() if by is reader and read is node for use in uses
        )
        if labels[-1:] != (COLUMN,):
            span = None
        key = ("load", node, labels, span)
        if key not in self._made:
            name = self.names[node, labels]
            place, inside = self._address(name, labels, span), self._inside(span.length) if span is not None else ""
            text = f"tl.load({place}, mask={inside}, other=0)" if inside else f"tl.load({place})"
            text = self._read_as(text, dtype(node))
            held = self._name(f"{name}_value" if span is None else f"{name}_tile")
            self._line(f"{held} = {text}")
            self._made[key] = held
        return self._made[key]

    def _read_as(self, text: str, kind: torch.dtype) -> str:
        if kind.is_floating_point:
            return f"{text}.to(tl.float32)"
        return f"{text} != 0" if kind == torch.bool else text

    def _address(self, name: str, labels: Labels, span: Span | None) -> str:
        rows = f"{name}_rows" if any(label not in (None, COLUMN) for label in labels) else name
        return rows if span is None else f"{rows} + {self._columns(span)} * {name}_stride_column"

    def _columns(self, span: Span) -> str:
        lanes = self._lanes(span.length)
        text = lanes if span.step == 1 else f"{span.step} * {lanes}"
        if span.start:
            text = f"{span.start} + {text}"
        return text if text == lanes else f"({text})"

    def _lanes(self, length: int) -> str:
        if ("lanes", length) not in self._made:
            padded = 1 << (length - 1).bit_length()
            name, inside = self._name(f"lanes_{length}"), f"inside_{length}"
            self.body.lengths.add(length)
            self._line(f"{name} = tl.arange(0, {padded})[None, :]")
            self._made["lanes", length] = name
            self._made["inside", length] = "" if padded == length else inside
            if padded != length:
                self._line(f"{inside} = {name} < {length}")
        return self._made["lanes", length]

    def _inside(self, length: int) -> str:
        self._lanes(length)
        return self._made["inside", length]

    def _store(self, view: View, span: Span | None) -> None:
        value = self._value(view.node, span)
        inside = self._inside(span.length) if span is not None else ""
        kept = f"kept & {inside}" if inside else "kept"
        columns = "" if span is None else f" + {self._columns(span)} * {view.name}_stride_column"
        self._line(f"tl.store({view.name}_rows{columns}, {value}, mask={kept})")

    def _line(self, text: str) -> None:
        self.body.lines.append("    " * self._indent + text)

    def _name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._used:
            name, number = f"{wanted}_{number}", number + 1
        self._used.add(name)
        return name


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    if not isinstance(operand, fx.Node):
        raise Unfusable(f"{node.name} has no operand")
    return operand


def _converts(node: fx.Node) -> bool:
    return operator_word(node.target) in ("to", "_to_copy")


def _start(node: fx.Node) -> str:
    """What a reduction starts from."""
    return {"amax": 'float("-inf")', "amin": 'float("inf")'}.get(operator_word(node.target), "0.0")


def _device_type(kind: torch.dtype) -> str:
    return f"tl.{str(kind).removeprefix('torch.')}"


def _number(value: Any, floating: bool) -> str:
    if not floating:
        return str(int(value))
    number = float(value)
    if math.isnan(number) or abs(number) > _FP32_MAX:
        return 'float("nan")' if math.isnan(number) else f'float("{"-" if number < 0 else ""}inf")'
    return f"({number!r})" if number < 0 else repr(number)
