"""Emitting the kernel of a row-wise region: one program a few rows, whatever the region computes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.axes import memory_order
from regraft.codegen.rowwise.expand import expand
from regraft.codegen.triton.emit import Kernel, Origin, render
from regraft.codegen.triton.rowwise.configs import LONGEST_WHOLE, chunk_configs, whole_configs
from regraft.codegen.triton.rowwise.device import DeviceText
from regraft.codegen.triton.rowwise.file import RegionFile

_NAME = "rowwise"
_TITLE = "A row-wise region of a graph: one program a few rows, each read once and its results written once."
_SPREAD = 1024  # rows without reductions and with more columns are cut into chunks


@dataclass(frozen=True)
class RegionKernel:
    """The kernel of a region; it takes the values of ``inputs`` and gives those of ``outputs``, nodes of the graph that
    the region was found in."""

    kernel: Kernel
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def emit_region(
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    fake_mode: FakeTensorMode,
    origins: tuple[Origin, ...] = (),
    chunked: bool | None = None,
) -> RegionKernel:
    """The kernel for ``nodes``, in topological order, of which ``outputs`` are read outside.

    ``chunked``: whether rows are gone through in chunks; by their length where it is None. Raises ``Unfusable`` with
    the reason where no kernel holds them.
    """
    made = expand(nodes, outputs, fake_mode)
    file = RegionFile(made)
    return RegionKernel(_kernel(file, _device(file, chunked), origins), tuple(made.inputs), tuple(outputs))


def _device(file: RegionFile, chunked: bool | None) -> DeviceText:
    def text(chunked: bool) -> DeviceText:
        return DeviceText(file.graph, file.rows, file.names, chunked, file.reserved)

    if chunked is None:
        tried = text(True)
        longest = max((span.length for spans in tried.spans.values() for span in spans), default=0)
        chunked = longest > LONGEST_WHOLE or (tried.spread is not None and longest > _SPREAD)
    return text(chunked)


def _kernel(file: RegionFile, device: DeviceText, origins: tuple[Origin, ...]) -> Kernel:
    body = device.write(file.writes)
    chunked, spread = device.chunked, device.spread
    sizes = ("BLOCK_ROWS", "BLOCK_COLUMNS") if chunked else ("BLOCK_ROWS",)
    configs = chunk_configs() if chunked else whole_configs(max(body.lengths, default=1))
    grid = f"triton.cdiv(row_count, block_rows), {f'triton.cdiv({spread}, block_columns)' if spread else ''}"
    text = render(
        "rowwise.py.j2",
        name=f"{_NAME}_@",
        meaning=f"Rows of a program, {'columns of a chunk, ' if chunked else ''}warps, stages",
        configs=configs,
        kernel_doc=file.doc(),
        sizes=sizes,
        config_names=[size.lower() for size in sizes],
        grid=grid.rstrip(),
        body="\n".join(body.lines),
        **file.common(body),
    )
    return file.finish(_NAME, _TITLE, text, origins, sizes, configs)


__all__ = ["RegionKernel", "emit_region", "memory_order"]
