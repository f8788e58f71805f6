"""The statements of a matrix product with its regions: rows before it, its loop, and what becomes of its tile."""

from __future__ import annotations

from typing import Any

from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.operators import product
from regraft.codegen.triton.rowwise.columns import Span
from regraft.codegen.triton.rowwise.device import DeviceText
from regraft.codegen.triton.rowwise.file import RegionFile
from regraft.ir.nodes import dtype, shape

#: Names of the template.
_RESERVED = (
    "columns",
    "valid",
    "operand",
    "program",
    "row_tiles",
    "group",
    "height",
    "place",
    "weight_rows",
    "address",
    "held",
)


class ProductText(DeviceText):
    """A region with products of one operand: ``accumulators`` name the columns of products that its results need."""

    block_rows, block_columns = "BLOCK_M", "BLOCK_K"

    def __init__(self, file: RegionFile) -> None:
        names = (*file.reserved, *_RESERVED)
        super().__init__(file.graph, file.rows, file.names, chunked=True, reserved=names)
        self.file = file
        self.products = [node for node in file.graph.nodes if node.target is product]
        self.operand = self._common_operand()
        self.columns = self._result_columns()
        self.accumulators: dict[tuple[fx.Node, Span], str] = {}

    @property
    def spread(self) -> int | None:
        """Chunks of the summed dim are a loop, always."""
        return None

    def _common_operand(self) -> fx.Node:
        operands = {node.args[0] for node in self.products}
        if len(operands) != 1:
            raise Unfusable("products of different operands are different kernels")
        (operand,) = operands
        assert isinstance(operand, fx.Node)
        weights = [node.args[1] for node in self.products]
        types = {dtype(node) for node in (operand, *weights)}
        if len(types) > 1:
            raise Unfusable(f"a product of {' and '.join(sorted(map(str, types)))}")
        behind = {node for node in self.products}
        for node in self.graph.nodes:
            if behind & set(node.all_input_nodes):
                behind.add(node)
        if any(self._is_reduction(node) for node in behind):
            raise Unfusable("a row is reduced behind a product, whose tile holds a part of it")
        if self.spans.get(operand, ()) != (Span(0, 1, int(shape(operand)[-1])),):
            raise Unfusable("the operand of a product is made of pieces")
        return operand

    def _result_columns(self) -> int:
        views = self.file.writes
        lengths = {span.length for view in views if view.wide for span in self.spans[view.node]}
        if len(lengths) != 1 or not all(view.wide for view in views):
            raise Unfusable("the results of a product have different columns")
        return lengths.pop()

    def epilogue(self) -> list[str]:
        """Statements from the accumulators to the stores; they say which accumulators there are."""
        outside, self.body.lines = self.body.lines, []
        held = dict(self._made)
        self._made["lanes", self.columns], self._made["inside", self.columns] = "columns", "valid"
        for view in self.file.writes:
            for span in self.spans[view.node]:
                self._store(view, span)
        lines, self.body.lines, self._made = self.body.lines, outside, held
        return lines

    def prologue(self) -> list[str]:
        """Statements of the rows in front of the loop: their reductions."""
        for level in range(1, self.levels + 1):
            self._reductions(level)
        self._settle(self.levels)
        return self.body.lines

    def step(self) -> list[str]:
        """Statements inside the loop: the operand's tile, and what it adds to each accumulator."""
        self.body.lines = []
        length = int(shape(self.operand)[-1])
        self._open_loop(length)
        operand = self._operand_text(Span(0, 1, length))
        if not self.file.axes:  # a single row
            operand = f"tl.broadcast_to({operand}, (BLOCK_M, BLOCK_K))"
        self._line(f"operand = {operand}")
        for (node, span), name in self.accumulators.items():
            weight = str(node.args[1])
            place = "weight_rows" if not span.start else f"({span.start} + weight_rows)"
            self._line(f"address = {weight} + {place} * {weight}_stride_out + lanes.T * {weight}_stride_in")
            self._line(f"held = load_tile(address, inside.T, {length} % BLOCK_K == 0)")
            self._line(f"{name} = tl.dot(operand, held, {name}{self.precision})")
        self._close_loop()
        return self.body.lines

    def _operand_text(self, span: Span) -> str:
        """The operand's tile in its type: as it lies in memory, or as the calls in front of the product make it."""
        if self.operand.op == "placeholder":
            view = next(view for view in self.file.reads if view.node is self.operand)
            address = self._address(view.name, view.labels, span)
            return f"load_tile({address}, inside, {span.length} % BLOCK_K == 0)"
        value = self._value(self.operand, span, self.products[0])
        return f"tl.where(inside, {value}, 0.0).to({self.element})"

    @property
    def element(self) -> str:
        """The element type of the operands, as the kernel names it."""
        return f"tl.{str(dtype(self.operand)).removeprefix('torch.')}"

    @property
    def precision(self) -> str:
        """How fp32 is multiplied: as PyTorch does unless it is told otherwise."""
        return ', input_precision="ieee"' if self.element == "tl.float32" else ""

    def _compute(self, node: fx.Node, span: Span | None) -> None:
        if node.target is not product:
            super()._compute(node, span)
            return
        assert span is not None and span.step == 1
        name = self.accumulators.setdefault((node, span), f"acc_{len(self.accumulators)}")
        self._made[node, span] = name

    def _count_levels(self, calls: list[fx.Node]) -> dict[fx.Node, int]:
        """Only what stands in front of a product is settled before the loop."""
        levels = super()._count_levels(calls)
        behind: set[Any] = set()
        for node in calls:
            if node.target is product or behind & set(node.all_input_nodes):
                behind.add(node)
        return {node: level for node, level in levels.items() if node not in behind}
