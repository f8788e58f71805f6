"""Lowering of operators on images ``[..., height, width]`` that PyTorch runs element by element: means of cells."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.ir.nodes import arguments, concrete, dtype, shape, tensor_value

aten = torch.ops.aten

_WORTH_IT = 1 << 15  # elements; fewer cost less than the calls
_FEW_ROWS = 4  # of a cell, that are added one by one
_WIDE = 32  # lines of an image that a sum over more rows takes less time for than PyTorch's mean


def lower_pool(context: Context, node: fx.Node) -> Lowered | None:
    """Means over cells that tile a dense image, in fp32; None for cells that overlap or leave pixels over, and for the
    mean of a whole image, which PyTorch computes in one pass."""
    x = arguments(node)["self"]
    cell = _tiling_cell(node)
    *_, height, width = shape(x)
    if cell is None or cell == (height, width) or dtype(x) != torch.float32 or not tensor_value(x).is_contiguous():
        return None
    if math.prod(concrete(size) for size in shape(x)) < _WORTH_IT or (cell[0] > _FEW_ROWS and width < _WIDE):
        return None
    weight = torch.full((cell[1],), 1 / math.prod(cell))
    return Lowered(full=context.call(mean_of_cells, context.value(x), context.bind(weight, node.name), cell[0]))


def _tiling_cell(node: fx.Node) -> tuple[int, int] | None:
    """Height and width of the cells whose means a call takes; None where they do not tile the image."""
    given = arguments(node)
    image, made = shape(given["self"])[-2:], shape(node)[-2:]
    if not all(isinstance(size, int) and size for size in (*image, *made)):
        return None
    if any(size % count for size, count in zip(image, made, strict=True)):
        return None
    height, width = (size // count for size, count in zip(image, made, strict=True))
    if node.target is aten.avg_pool2d.default and not _is_of_cells(given, (height, width)):
        return None
    return height, width


def _is_of_cells(given: dict[str, Any], cell: tuple[int, int]) -> bool:
    """Whether an average over windows takes each cell once."""
    sizes = [list(given[name]) for name in ("kernel_size", "stride", "padding")]
    kernel, stride, padding = (size * 2 if len(size) == 1 else size for size in sizes)
    return kernel == list(cell) == (stride or kernel) and not any(padding) and given["divisor_override"] is None


def mean_of_cells(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Means over cells of ``x`` ``[..., height, width]``, of ``rows`` times as many columns as there are numbers in
    ``weight``, each one over the size of a cell. Rows are added a line at a time, columns by a product."""
    *leading, height, width = x.shape
    lines = x.reshape(*leading, height // rows, rows, width)
    total = functools.reduce(torch.add, lines.unbind(-2)) if rows <= _FEW_ROWS else lines.sum(-2)
    columns = weight.shape[0]
    return total.reshape(-1, columns).mv(weight).reshape(*leading, height // rows, width // columns)
