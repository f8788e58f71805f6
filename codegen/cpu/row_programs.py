"""Regions of calls on rows as row programs (``native/fused.cpp``): one pass over memory for what a chain of
element-wise calls and reductions of rows would write and read again.

Regions are found as for GPUs (``codegen/rowwise``), in fp32; norms, rope and gates, which have kernels of their
own, stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.native.fused import (
    MOST_AXES,
    MOST_OPERANDS,
    Instruction,
    Made,
    Place,
    RowProgram,
    code_of,
)
from regraft.codegen.cpu.row_instructions import MOVES, WRITERS, Emitter
from regraft.codegen.rowwise.axes import COLUMN, Labels, RowAxes, Unfusable, memory_order
from regraft.codegen.rowwise.expand import Expansion
from regraft.codegen.rowwise.operators import interleave
from regraft.codegen.rowwise.primitives import REDUCTIONS, is_copy, operator_word
from regraft.ir.nodes import arguments, dtype, shape

_LONGEST_ROW = 16384  # of a program that needs whole rows: its registers stay in the second cache
_WHOLE = (*REDUCTIONS, "slice", "cat", "repeat_interleave")  # words that need whole rows


def compiled(made: Expansion) -> tuple[RowProgram, list[fx.Node]]:
    """The program of a region that is written out, and its operands; raises ``Unfusable`` where these or the axes are
    too many."""
    compiler = _Compiler(made)
    return compiler.program(), compiler.operands()


@dataclass
class _Compiler(Emitter):
    """Writes instructions on registers without end, which are few at last."""

    made: Expansion
    rows: RowAxes = field(init=False)
    axes: list[int] = field(init=False)
    reads: list[tuple[fx.Node, Labels]] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    registers: int = 0
    whole: bool = False
    _held: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        calls = [node for node in self.made.graph.nodes if node.op == "call_function"]
        self.rows = RowAxes.of(calls)
        self.axes = self._ordered_axes()
        self.whole = any(operator_word(node.target) in _WHOLE or node.target is interleave for node in calls)

    def _results(self) -> list[fx.Node]:
        found = self.made.graph.output_node().args[0]
        assert isinstance(found, (tuple, list))
        return [node for node in found if isinstance(node, fx.Node)]

    def _ordered_axes(self) -> list[int]:
        """The axes in the order of memory of the first result that has all."""
        for result, node in zip(self._results(), self.made.outputs, strict=True):
            if result.op == "placeholder":
                raise Unfusable("a result is what the region reads")
            if self.rows.axes(result) == set(self.rows.sizes):
                labels = self.rows.labels[result]
                found = [labels[dim] for dim in memory_order(node)]
                return [label for label in found if label is not None and label != COLUMN]
        raise Unfusable("no result has all the rows")

    def program(self) -> RowProgram:
        """The instructions with few registers, and where operands lie."""
        for node in self.made.graph.nodes:
            if node.op == "call_function":
                self._held[node] = self._write(node)
        results = self._results()
        operands = len(self.reads) + len(results)
        if operands > MOST_OPERANDS or len(self.axes) > MOST_AXES:
            raise Unfusable(f"{operands} operands and {len(self.axes)} axes are too many for one program")
        for number, result in enumerate(results):
            self.code.append(
                Instruction(
                    "store", a=self._held[result], operand=len(self.reads) + number, width=self.width_of(result)
                )
            )
        columns = max(item.width for item in self.code)
        if self.whole and columns > _LONGEST_ROW:
            raise Unfusable(f"rows of {columns} are too long to be held")
        code, registers = _allocated(self.code)
        writes = tuple(self._made(node, result) for result, node in zip(results, self.made.outputs, strict=True))
        reads = tuple(self._place(labels) for _, labels in self.reads)
        return RowProgram(code_of(code), registers, columns, self.whole, self._sizes(), reads, writes)

    def operands(self) -> list[fx.Node]:
        """What each read of the program is, a node of the source graph."""
        places = [node for node in self.made.graph.nodes if node.op == "placeholder"]
        return [self.made.inputs[places.index(node)] for node, _ in self.reads]

    def _sizes(self) -> tuple[tuple[int, int], ...]:
        found = []
        for axis in self.axes:
            places = [(number, labels.index(axis)) for number, (_, labels) in enumerate(self.reads) if axis in labels]
            if not places:
                raise Unfusable("a number of rows that no operand has")
            found.append(places[0])
        return tuple(found)

    def _place(self, labels: Labels) -> Place:
        axes = tuple(labels.index(axis) if axis in labels else None for axis in self.axes)
        return Place(axes, labels.index(COLUMN) if COLUMN in labels else None)

    def _made(self, node: fx.Node, result: fx.Node) -> Made:
        labels = self.rows.labels[result]
        dims = tuple(
            (None, 1) if label is None else (None, int(size)) if label == COLUMN else (self.axes.index(label), 0)
            for label, size in zip(labels, shape(result), strict=True)
        )
        return Made(self._place(labels), dims, memory_order(node), dtype(result))

    def width_of(self, node: fx.Node, labels: Labels | None = None) -> int:
        labels = self.rows.labels[node] if labels is None else labels
        return int(shape(node)[labels.index(COLUMN)]) if COLUMN in labels else 1

    def emit(self, word: str, width: int, **fields: Any) -> int:
        """An instruction whose result is a new register."""
        self.registers += 1
        self.code.append(Instruction(word, to=self.registers - 1, width=width, **fields))
        return self.registers - 1

    def _write(self, node: fx.Node) -> int:
        word = operator_word(node.target) or ("interleave" if node.target is interleave else "")
        if is_copy(node) or word in MOVES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if dtype(node) == torch.bool and dtype(source) != torch.bool:
                return self.emit("ne", self.width_of(node), a=self.value(node, source), number=0.0)
            return self.value(node, source)
        writer = WRITERS.get(word)
        if writer is None:
            raise Unfusable(f"{node.name} has no row instruction")
        return writer(self, node, arguments(node))

    def value(self, node: fx.Node, operand: Any, width: int | None = None) -> int:
        """The register of an operand of ``node`` that is ``width`` columns wide, as ``node`` is by default."""
        width = self.width_of(node) if width is None else width
        if not isinstance(operand, fx.Node):
            number = float(operand)
            return self._kept(("number", number, width), lambda: self.emit("fill", width, number=number))
        if operand in self._held:
            own, held = self.width_of(operand), self._held[operand]
        else:
            labels = self._labels(node, operand)
            own = self.width_of(operand, labels)
            held = self._kept((operand, labels), lambda: self._load(operand, labels, own))
        if own == width:
            return held
        return self._kept(("expand", held, width), lambda: self.emit("expand", width, a=held))

    def _labels(self, node: fx.Node, operand: fx.Node) -> Labels:
        uses = self.rows.reads[node, operand]
        if len(uses) > 1:
            raise Unfusable(f"{node.name} reads {operand.name} in two ways")
        return uses[0]

    def _load(self, operand: fx.Node, labels: Labels, width: int) -> int:
        self.reads.append((operand, labels))
        return self.emit("load", width, operand=len(self.reads) - 1)

    def _kept(self, key: Any, make: Callable[[], int]) -> int:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]


def _sources(item: Instruction) -> tuple[str, ...]:
    """The fields of an instruction that name registers which it reads."""
    return tuple(name for name in ("a", "b", "c") if getattr(item, name) >= 0)


def _read(item: Instruction) -> set[int]:
    return {getattr(item, name) for name in _sources(item)}


def _allocated(code: Sequence[Instruction]) -> tuple[list[Instruction], int]:
    """The same instructions on as few registers as what is alive at a time."""
    last = {register: place for place, item in enumerate(code) for register in _read(item)}
    free: list[int] = []
    held: dict[int, int] = {}
    count, made = 0, []
    for place, item in enumerate(code):
        sources = _read(item)
        renamed: dict[str, Any] = {name: held[getattr(item, name)] for name in _sources(item)}
        if item.to >= 0 and item.to not in held:
            if not free:
                free.append(count)
                count += 1
            held[item.to] = free.pop()
        to = held[item.to] if item.to >= 0 else -1
        made.append(replace(item, to=to, **renamed))
        free += [held[register] for register in sources if last[register] == place and register != item.to]
    return made, count
