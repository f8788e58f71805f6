"""Emitting the kernel that brings tokens together as a plan says, with the log of sizes and the norm behind it.

One program a token that stays. It looks for the tokens that come to it, in their order, and adds up in fp32, so that
the same bits come out on every call. Where the graph normalises the merged tokens next, the row is normalised where it
is; the statements come from the emitter of row-wise regions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.axes import COLUMN, Unfusable
from regraft.codegen.rowwise.expand import expand
from regraft.codegen.rowwise.operators import FLOATS
from regraft.codegen.triton.emit import (
    POINTER_KINDS,
    Entry,
    Kernel,
    Origin,
    Parameter,
    digest,
    dtype_name,
    header,
    render,
)
from regraft.codegen.triton.rowwise.columns import Span
from regraft.codegen.triton.rowwise.device import DeviceText, View
from regraft.codegen.triton.rowwise.file import RegionFile
from regraft.codegen.triton.rowwise.helpers import helper_text
from regraft.codegen.triton.rowwise.reference import reference_lines
from regraft.codegen.triton.tokens.configs import WIDEST, merge_configs, padded
from regraft.ir.nodes import dtype

_NAME = "token_merge"
_TITLE = "Tokens brought together as a plan says, each in the share of its size: one program a token that stays."
#: Names of the template.
_RESERVED = (
    *("x", "sizes", "kept", "sources", "slots", "merged", "total", "logs", "normed", "left", "removed", "place"),
    *(
        "row",
        "batch",
        "slot",
        "columns",
        "inside",
        "own",
        "size",
        "first",
        "order",
        "tokens",
        "coming",
        "share",
        "next",
    ),
)


@dataclass(frozen=True)
class MergeSpec:
    """A ``regraft::merge_tokens`` of ``[batch, tokens, width]``. ``sizes``: the tokens have sizes already; ``logs``:
    the logarithm of the new sizes is an output, in fp32."""

    dtype: torch.dtype
    width: int
    sizes: bool = False
    logs: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise Unfusable(f"tokens in {self.dtype} are merged by no kernel")
        if self.width > WIDEST:
            raise Unfusable(f"tokens of {self.width} numbers are wider than a program holds, {WIDEST}")


@dataclass(frozen=True)
class MergeKernel:
    """The kernel; behind the merge's own operands it takes the values of ``inputs``, weights of the norm."""

    kernel: Kernel
    inputs: tuple[fx.Node, ...] = ()


def emit_merge_tokens(
    spec: MergeSpec,
    norm: Sequence[fx.Node] = (),
    merged: fx.Node | None = None,
    fake_mode: FakeTensorMode | None = None,
    origins: tuple[Origin, ...] = (),
) -> MergeKernel:
    """The kernel of a spec; with the row-wise calls ``norm`` of ``merged``, the last of which is one more output.

    It returns merged tokens, sizes, and where asked for their logarithms and the normalised tokens. Raises
    ``Unfusable`` where no kernel holds these calls.
    """
    behind = _Behind.of(spec, norm, merged, fake_mode) if norm else None
    views = behind.weights if behind else []
    normed = behind.dtype if behind else None
    parameters = _parameters(spec, views, normed)
    names = ["x", *(["sizes"] if spec.sizes else []), "kept", "sources", "slots", *(view.name for view in views)]
    outputs = ["merged", "total", *(["logs"] if spec.logs else []), *(["normed"] if behind else [])]
    rounds = sorted({spec.dtype, *(behind.text.body.rounds if behind else ())} - {torch.float32}, key=str)
    configs = merge_configs(spec.width)
    body = render(
        "merge_tokens.py.j2",
        name=f"{_NAME}_@",
        spec=spec,
        configs=configs,
        padded=padded(spec.width),
        whole=padded(spec.width) == spec.width,
        kernel_arguments=[parameter.name for parameter in parameters],
        unspecialized=[f'"{parameter.name}"' for parameter in parameters if _is_size(parameter.name)],
        rounds=[dtype_name(kind) for kind in rounds],
        helpers=helper_text(behind.text.body.helpers) if behind else "",
        norm_lines=behind.text.body.lines if behind else [],
        norm_value=behind.value if behind else "",
        norm_reference=reference_lines(behind.file.graph) if behind else [],
        weights=[(view.name, dtype(view.node)) for view in views],
        element=dtype_name(spec.dtype),
        parameters=[f"{name}: Tensor" for name in names],
        norm_parameters=[f"{view.name}: Tensor" for view in views],
        arguments=names,
        outputs=outputs,
        results=outputs,
        returns=f"tuple[{', '.join(['Tensor'] * len(outputs))}]",
        launch_values=[_launch_value(parameter.name) for parameter in parameters],
        fake=_fake(names, outputs, normed),
    )
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    name = f"{_NAME}_{digest(body, 8)}"
    facts = {"element": f"{dtype_name(spec.dtype)}, width {spec.width}", "outputs": ", ".join(outputs)}
    source = header(_TITLE, facts, origins) + body.replace(f"{_NAME}_@", name)
    kernel = Kernel(name, source, (Entry(name, parameters, ("BLOCK_SOURCES",), configs),), tuple(names))
    return MergeKernel(kernel, behind.inputs if behind else ())


@dataclass
class _Behind:
    """The calls behind a merge as statements on its row."""

    file: RegionFile
    text: _RowText
    value: str
    inputs: tuple[fx.Node, ...]

    @staticmethod
    def of(spec: MergeSpec, norm: Sequence[fx.Node], merged: fx.Node | None, mode: FakeTensorMode | None) -> _Behind:
        assert merged is not None and mode is not None
        made = expand(norm, [norm[-1]], mode)
        file = RegionFile(made)
        placeholders = [node for node in file.graph.nodes if node.op == "placeholder"]
        row = placeholders[made.inputs.index(merged)]
        text = _RowText(file, row, spec.width)
        (result,) = file.results
        pieces = text.spans[result]
        if pieces != (Span(0, 1, spec.width),):
            raise Unfusable("what stands behind a merge is made of pieces of rows")
        value = text.value(result, pieces[0])
        inputs = tuple(node for node in made.inputs if node is not merged)
        found = _Behind(file, text, value, inputs)
        if any(view.labels != (COLUMN,) for view in found.weights) or len(found.weights) != len(inputs):
            raise Unfusable("what stands behind a merge reads more than weights")
        return found

    @property
    def weights(self) -> list[View]:
        """What the calls read beside the row."""
        return [view for view in self.file.reads if view.node is not self.text.row]

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the result."""
        return dtype(self.file.results[0])


class _RowText(DeviceText):
    """The statements of calls on a row that is in registers already, as ``tile``."""

    def __init__(self, file: RegionFile, row: fx.Node, width: int) -> None:
        super().__init__(file.graph, file.rows, file.names, chunked=False, reserved=(*_RESERVED, "tile"))
        self.row = row
        self._made["lanes", width] = "columns"
        self._made["inside", width] = "" if padded(width) == width else "inside"

    def value(self, node: fx.Node, span: Span) -> str:
        """The name of a value, behind the statements that make it."""
        return self._value(node, span)

    def _loaded(self, node: fx.Node, span: Span | None, reader: fx.Node | None) -> str:
        return "tile" if node is self.row else super()._loaded(node, span, reader)


def _parameters(spec: MergeSpec, weights: Sequence[View], normed: torch.dtype | None) -> tuple[Parameter, ...]:
    element, even = POINTER_KINDS[spec.dtype], spec.width % 16 == 0
    found = [Parameter("x", element, aligned=True)]
    found += [Parameter("sizes", "*fp32", aligned=True)] if spec.sizes else []
    found += [Parameter(name, "*i64", aligned=True) for name in ("kept", "sources", "slots")]
    found += [Parameter(view.name, POINTER_KINDS[dtype(view.node)], aligned=True) for view in weights]
    found += [Parameter("merged", element, aligned=True), Parameter("total", "*fp32", aligned=True)]
    found += [Parameter("logs", "*fp32", aligned=True)] if spec.logs else []
    found += [Parameter("normed", POINTER_KINDS[normed], aligned=True)] if normed is not None else []
    found += [Parameter(name, "i32") for name in ("left", "removed")]
    strides: list[tuple[str, dict[str, Any]]] = [
        ("x_stride_batch", {"kind": "i64"}),
        ("x_stride_token", {"aligned": even}),
        ("x_stride_column", {"value": 1}),
    ]
    strides += [("sizes_stride_batch", {}), ("sizes_stride_token", {"value": 1})] if spec.sizes else []
    for name in ("kept", "sources", "slots"):
        strides += [(f"{name}_stride_batch", {}), (f"{name}_stride_token", {"value": 1})]
    strides += [(f"{view.name}_stride_column", {"value": 1}) for view in weights]
    return (*found, *(Parameter(name, **{"kind": "i32", **options}) for name, options in strides))


def _is_size(name: str) -> bool:
    """Whether every variant of a kernel serves a parameter, be it 1 or a multiple of 16."""
    return name in ("left", "removed") or name.endswith("_stride_batch")


def _launch_value(name: str) -> str:
    tensor, mark, dim = name.partition("_stride_")
    if not mark:
        return "sources.shape[1]" if name == "removed" else name
    return f"{tensor}.stride({ {'batch': 0, 'token': 1, 'column': -1}[dim] })"


def _fake(names: Sequence[str], outputs: Sequence[str], normed: torch.dtype | None) -> str:
    sizes = "(batch, left, WIDTH.value)"
    texts = {
        "merged": f"x.new_empty({sizes})",
        "total": "x.new_empty((batch, left), dtype=torch.float32)",
        "logs": "x.new_empty((batch, left), dtype=torch.float32)",
        "normed": f"x.new_empty({sizes}, dtype={normed})",
    }
    lines = [f"    batch, left = check({', '.join(names)})"]
    lines += [f"    {name} = {texts[name]}" for name in outputs]
    return "\n".join([*lines, f"    return {', '.join(outputs)}"])
