"""The emitted file of a region beside its kernel: tensors and their strides, checks, memory of results, reference."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.axes import COLUMN, UNIT, Labels, RowAxes, Unfusable, memory_order
from regraft.codegen.rowwise.expand import Expansion
from regraft.codegen.rowwise.operators import interleave, product
from regraft.codegen.triton.emit import POINTER_KINDS, Entry, Kernel, Origin, Parameter, digest, header
from regraft.codegen.triton.rowwise.device import Body, View
from regraft.codegen.triton.rowwise.helpers import helper_text
from regraft.codegen.triton.rowwise.reference import reference_lines
from regraft.ir.nodes import dtype, shape


class RegionFile:
    """The emitted file of a region: what it reads and writes, by which names, and the functions around its kernel.

    A weight of a matrix product has no rows of the region; it is read as ``[out, in]``.
    """

    def __init__(self, made: Expansion) -> None:
        self.made, self.graph = made, made.graph
        results = self.graph.output_node().args[0]
        assert isinstance(results, (tuple, list))
        self.results = [result for result in results if isinstance(result, fx.Node)]
        if any(result.op == "placeholder" for result in self.results):
            raise Unfusable("a result is what the region reads")
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        self.rows = RowAxes.of(calls)
        self.axes = self._ordered_axes()
        numbered = [f"axis_{number}" for number in range(len(self.axes))]
        names = {1: ["row"], 2: ["batch", "row"]}.get(len(self.axes), numbered)
        self.axis_name = dict(zip(self.axes, names, strict=True))
        self.weights = list(dict.fromkeys(node.args[1] for node in calls if node.target is product))
        self.reads = self._reads()
        self.writes = [View(name, node, self.rows.labels[node]) for name, node in self._output_names()]
        views = [view.name for view in (*self.reads, *self.writes)]
        self.reserved = [*views, *names, *(f"{name}_rows" for name in views), *map(str, self.weights)]
        self.names = {(view.node, view.labels): view.name for view in self.reads}

    def _ordered_axes(self) -> list[int]:
        """The row axes in the order of memory of the first result that has all; none where there is a single row."""
        for result, node in zip(self.results, self.made.outputs, strict=True):
            labels = self.rows.labels[result]
            if self.rows.axes(result) == set(self.rows.sizes):
                found = [labels[dim] for dim in memory_order(node)]
                return [label for label in found if label is not None and label != COLUMN]
        raise Unfusable("no result has all the rows")

    def _reads(self) -> list[View]:
        """What the kernel reads, each tensor once for each way in which its dims meet rows and columns."""
        found: dict[tuple[fx.Node, Labels], View] = {}
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            uses = [use for (_, read), held in self.rows.reads.items() if read is node for use in held]
            for number, labels in enumerate(dict.fromkeys(uses)):
                found.setdefault((node, labels), View(f"{node.name}_{number}" if number else node.name, node, labels))
            if not uses and node not in self.weights:
                self.made.inputs.pop(placeholders.index(node))
                placeholders = [other for other in placeholders if other is not node]
                self.graph.erase_node(node)
        return list(found.values())

    def _output_names(self) -> list[tuple[str, fx.Node]]:
        if len(self.results) == 1:
            return [("out", self.results[0])]
        return [(f"out_{number}", result) for number, result in enumerate(self.results)]

    def common(self, body: Body) -> dict[str, Any]:
        """What every template of a region's file names."""
        arguments = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        axes = [self.axis_name[axis] for axis in self.axes]
        returns = "Tensor" if len(self.results) == 1 else f"tuple[{', '.join(['Tensor'] * len(self.results))}]"
        return {
            "rounds": sorted(str(kind).removeprefix("torch.") for kind in body.rounds),
            "helpers": helper_text(body.helpers),
            "kernel_arguments": [parameter.name for parameter in self._parameters()],
            "index_lines": self._index_lines(),
            "pointer_lines": self._pointer_lines(),
            "parameters": [f"{name}: Tensor" for name in arguments],
            "arguments": arguments,
            "returns": returns,
            "reference_lines": reference_lines(self.graph),
            "interleaves": any(node.target is interleave for node in self.graph.nodes),
            "axis_names": axes,
            "assigned": _assigned(axes),
            "row_count": " * ".join(axes) or "1",
            "columns_of": self._columns_of() or ["1"],
            "axis_tuple": f"({axes[0]},)" if len(axes) == 1 else f"({', '.join(axes)})",
            "check_lines": self._check_lines(),
            "outputs": [
                _Output(view.name, f"    {view.name} = {self._empty(number)}")
                for number, view in enumerate(self.writes)
            ],
            "results": [view.name for view in self.writes],
            "launch_values": self._launch_values(),
            "fake": self._fake(arguments, axes),
        }

    def finish(
        self,
        name: str,
        title: str,
        text: str,
        origins: tuple[Origin, ...],
        sizes: tuple[str, ...],
        *configs: dict[str, tuple[int, ...]],
    ) -> Kernel:
        """The file from its rendered text; an entry for each table of tiles."""
        text = re.sub(r"\n{4,}", "\n\n\n", text)
        full = f"{name}_{digest(text, 8)}"
        source = header(title, self._facts(), origins) + text.replace(f"{name}_@", full)
        entries = tuple(Entry(full, self._parameters(), sizes, table) for table in configs)
        arguments = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        return Kernel(full, source, entries, tuple(arguments))

    def doc(self) -> str:
        """What the kernel's docstring says."""
        rows = ", ".join(self.axis_name[axis] for axis in self.axes)
        return f"A few of the rows [{rows}]." if rows else "The single row."

    def _facts(self) -> dict[str, str]:
        described = [f"{view.name} {self._described(view)}" for view in (*self.reads, *self.writes)]
        for node in self.weights:
            described.append(f"{node.name} {str(dtype(node)).removeprefix('torch.')} {list(shape(node))}")
        return {"tensors": "; ".join(described), "rows": ", ".join(self.axis_name[axis] for axis in self.axes)}

    def _described(self, view: View) -> str:
        kind = str(dtype(view.node)).removeprefix("torch.")
        return f"{kind} [{', '.join(self._size(view, dim) for dim in range(len(view.labels)))}]"

    def _size(self, view: View, dim: int) -> str:
        label = view.labels[dim]
        if label is UNIT:
            return "1"
        return str(shape(view.node)[-1]) if label == COLUMN else self.axis_name[label]

    def _parameters(self) -> tuple[Parameter, ...]:
        pointers = [(view.name, view.node) for view in (*self.reads, *self.writes)]
        pointers += [(node.name, node) for node in self.weights]
        found = [Parameter(name, POINTER_KINDS[dtype(node)], aligned=True) for name, node in pointers]
        found.append(Parameter("row_count", "i32"))
        found += [Parameter(f"{self.axis_name[axis]}_size", "i32") for axis in self.axes[1:]]
        for view in (*self.reads, *self.writes):
            for name, _ in self._strides(view):
                column = name.endswith("_column")
                aligned = view.wide and shape(view.node)[-1] % 16 == 0
                found.append(Parameter(name, "i32", 1 if column else None, aligned=aligned and not column))
        for node in self.weights:
            found.append(Parameter(f"{node.name}_stride_out", "i32", aligned=shape(node)[1] % 16 == 0))
            found.append(Parameter(f"{node.name}_stride_in", "i32", 1))
        return tuple(found)

    def _strides(self, view: View) -> list[tuple[str, int]]:
        """Stride parameters of a tensor and the dims that they belong to."""
        dims = {label: dim for dim, label in enumerate(view.labels) if label is not None}
        found = [(f"{view.name}_stride_{self.axis_name[axis]}", dims[axis]) for axis in self.axes if axis in dims]
        return [*found, (f"{view.name}_stride_column", dims[COLUMN])] if COLUMN in dims else found

    def _launch_values(self) -> list[str]:
        values = []
        for view in (*self.reads, *self.writes):
            text = self._argument(view)
            values.append(f"{text}.view(torch.uint8)" if dtype(view.node) == torch.bool else text)
        values += [node.name for node in self.weights]
        values += ["row_count", *(self.axis_name[axis] for axis in self.axes[1:])]
        for view in (*self.reads, *self.writes):
            values += [f"{self._argument(view)}.stride({dim})" for _, dim in self._strides(view)]
        values += [f"{node.name}.stride({dim})" for node in self.weights for dim in (0, 1)]
        return values

    def _argument(self, view: View) -> str:
        return view.node.name if view in self.reads else view.name

    def _columns_of(self) -> list[str]:
        """For each tensor with columns, how far its last column lies from the first: places in a row are 32-bit."""
        found = [
            f"{self._argument(view)}.stride({view.labels.index(COLUMN)}) * {shape(view.node)[-1]}"
            for view in (*self.reads, *self.writes)
            if view.wide
        ]
        return list(dict.fromkeys([*found, *(f"{node.name}.stride(1) * {shape(node)[1]}" for node in self.weights)]))

    def _index_lines(self) -> list[str]:
        if not self.axes:
            return []
        if len(self.axes) == 1:
            return [f"{self.axis_name[self.axes[0]]} = rows.to(tl.int64)"]
        lines, passed = [], ""
        for axis in reversed(self.axes):
            name = self.axis_name[axis]
            text = f"rows // ({passed})" if " * " in passed else f"rows // {passed}" if passed else "rows"
            if axis != self.axes[0]:
                text = f"{text} % {name}_size"
                passed = f"{name}_size * {passed}" if passed else f"{name}_size"
            lines.append(f"{name} = ({text}).to(tl.int64)")
        return lines

    def _pointer_lines(self) -> list[str]:
        lines = []
        for view in (*self.reads, *self.writes):
            terms = [
                f"{self.axis_name[axis]} * {view.name}_stride_{self.axis_name[axis]}"
                for axis in self.axes
                if axis in view.labels
            ]
            if not terms and view in self.writes:
                terms = ["0 * rows"]  # a single row, for each of the program's
            if terms:
                lines.append(f"{view.name}_rows = {' + '.join([view.name, *terms])}")
        return lines

    def _check_lines(self) -> list[str]:
        lines = []
        known: set[int] = set()
        for view in self.reads:
            fresh = {label: dim for dim, label in enumerate(view.labels) if label is not None and label != COLUMN}
            fresh = {axis: dim for axis, dim in fresh.items() if axis not in known}
            if fresh:
                lines += [
                    f"    if {view.node.name}.dim() != {len(view.labels)}:",
                    f'        raise ValueError(f"{view.node.name} is {{tuple({view.node.name}.shape)}}: '
                    f'expected {len(view.labels)} dims")',
                ]
            lines += [f"    {self.axis_name[axis]} = {view.node.name}.shape[{dim}]" for axis, dim in fresh.items()]
            known |= set(fresh)
        for view in self.reads:
            sizes = ", ".join(self._size(view, dim) for dim in range(len(view.labels)))
            sizes += "," if len(view.labels) == 1 else ""
            lines.append(f'    expect("{view.node.name}", {view.node.name}, {dtype(view.node)}, ({sizes}))')
        for node in self.weights:
            lines.append(f'    expect("{node.name}", {node.name}, {dtype(node)}, {tuple(shape(node))})')
        return lines

    def _empty(self, number: int) -> str:
        view, node = self.writes[number], self.made.outputs[number]
        sizes = ", ".join(self._size(view, dim) for dim in range(len(view.labels)))
        order = ", ".join(map(str, memory_order(node)))
        comma = "," if len(view.labels) == 1 else ""
        device = next(node.name for node in self.graph.nodes if node.op == "placeholder")
        return f"empty_in_order(({sizes}{comma}), ({order}{comma}), {dtype(view.node)}, {device}.device)"

    def _fake(self, arguments: list[str], axes: list[str]) -> str:
        opening = f"    {_assigned(axes)}check({', '.join(arguments)})\n"
        values = [self._empty(number) for number in range(len(self.writes))]
        if len(values) == 1:
            return f"{opening}    return {values[0]}"
        lines = "\n".join(f"        {value}," for value in values)
        return f"{opening}    return (\n{lines}\n    )"


@dataclass(frozen=True)
class _Output:
    name: str
    allocation: str


def _assigned(names: list[str]) -> str:
    """The left side of an assignment of a tuple to names."""
    return f"({names[0]},) = " if len(names) == 1 else f"{', '.join(names)} = " if names else ""
