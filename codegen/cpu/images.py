"""Lowering of operators on images ``[..., channels, height, width]`` that PyTorch runs pixel by pixel: means of cells,
windows cut out side by side, and windows added up."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.kernels import FUSED
from regraft.codegen.cpu.native_operators import reshaped_native
from regraft.ir.nodes import arguments, concrete, dtype, rank, shape, tensor_value

aten = torch.ops.aten

_WORTH_IT = 1 << 15  # elements; fewer cost less than the calls
_FEW_ROWS = 4  # of a cell, that are added one by one
_WIDE = 32  # lines of an image that a sum over more rows takes less time for than PyTorch's mean
_SHORT = 8  # windows with gaps, or pixels, along a line of an image; PyTorch is as fast with fewer
_SHORTEST = 4  # windows without gaps
_MOST_TAPS = 64  # of windows that are added up; with more, reading each tap across memory costs more than it saves


def lower_pool(context: Context, node: fx.Node) -> Lowered | None:
    """Means over cells that tile a dense image, in fp32; None for cells that overlap or leave pixels over, and for the
    mean of a whole image, which PyTorch computes in one pass."""
    x = arguments(node)["self"]
    cell = _tiling_cell(node)
    *_, height, width = shape(x)
    if cell is None or cell == (height, width) or dtype(x) != torch.float32 or not _is_dense(x):
        return None
    if math.prod(concrete(size) for size in shape(x)) < _WORTH_IT or (cell[0] > _FEW_ROWS and width < _WIDE):
        return None
    weight = torch.full((cell[1],), 1 / math.prod(cell), dtype=torch.float32)
    return Lowered(full=context.call(mean_of_cells, context.value(x), context.bind(weight, node.name), cell[0]))


def _is_dense(x: fx.Node) -> bool:
    """Whether a value lies in memory in the order of its dims. Strides are compared as numbers: to ask a tensor of
    symbolic sizes would bind them to the example's."""
    sizes, strides = ([concrete(number) for number in numbers] for numbers in (shape(x), tensor_value(x).stride()))
    dense = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    return all(size == 1 or found == step for size, found, step in zip(sizes, strides, dense, strict=True))


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
    kernel = _pair(given["kernel_size"])
    stride = _pair(given["stride"] or kernel)
    return kernel == cell == stride and not any(given["padding"]) and given["divisor_override"] is None


def mean_of_cells(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Means over cells of ``x`` ``[..., height, width]``, of ``rows`` times as many columns as there are numbers in
    ``weight``, each one over the size of a cell. Rows are added a line at a time, columns by a product."""
    *leading, height, width = x.shape
    lines = x.reshape(*leading, height // rows, rows, width)
    total = functools.reduce(torch.add, lines.unbind(-2)) if rows <= _FEW_ROWS else lines.sum(-2)
    columns = weight.shape[0]
    return total.reshape(-1, columns).mv(weight).reshape(*leading, height // rows, width // columns)


def lower_unfold(context: Context, node: fx.Node) -> Lowered | None:
    """Windows of an image in fp32 as one copy of a view, which products read without the copy; None for windows with
    holes, few of them, and images of symbolic height or width."""
    given = arguments(node)
    x = given["self"]
    elements = math.prod(concrete(size) for size in shape(node))
    if _pair(given["dilation"]) != (1, 1) or dtype(x) != torch.float32 or elements < _WORTH_IT:
        return None
    if not all(isinstance(size, int) for size in shape(x)[-3:]) or not context.can_unflatten(node) or FUSED.missing():
        return None
    padding, stride = _pair(given["padding"]), _pair(given["stride"])
    across = (shape(x)[-1] + 2 * padding[1] - _pair(given["kernel_size"])[1]) // stride[1] + 1
    if across < (_SHORTEST if stride[1] == 1 else _SHORT):
        return None
    steps = [*_windows(given, rank(x))]
    view = functools.reduce(lambda held, step: context.call(step[0], held, *step[1:]), steps, context.value(x))
    if isinstance(shape(x)[0], int):  # fake values of symbolic sizes would bind them to the example's
        with context.program.fake_mode:
            view.meta["val"] = functools.reduce(lambda held, step: step[0](held, *step[1:]), steps, tensor_value(x))
    return Lowered(full=context.call(reshaped_native, view, context.sizes(node)))


def _windows(given: dict[str, Any], dims: int) -> Iterator[tuple[Any, ...]]:
    """The calls, one on the result of the other, that view an image as ``[..., channels, kernel height, kernel width,
    windows down, windows across]``; what follows the first operand."""
    padding = _pair(given["padding"])
    if any(padding):
        yield aten.constant_pad_nd.default, [padding[1], padding[1], padding[0], padding[0]]
    for kernel, stride in zip(_pair(given["kernel_size"]), _pair(given["stride"]), strict=True):
        yield aten.unfold.default, -2, kernel, stride
    leading = range(dims - 2)
    yield aten.permute.default, [*leading, dims, dims + 1, dims - 2, dims - 1]


def lower_fold(context: Context, node: fx.Node) -> Lowered | None:
    """Windows at every pixel of a large image in fp32, added up tap by tap; None for windows with gaps, holes or
    many taps, and for small images, which PyTorch is as fast with."""
    given = arguments(node)
    x, size = given["self"], _pair(given["output_size"])
    apart = any(step > 1 for name in ("stride", "dilation") for step in given[name])
    elements = math.prod(concrete(size) for size in shape(node))
    if apart or dtype(x) != torch.float32 or elements < _WORTH_IT or not all(isinstance(side, int) for side in size):
        return None
    kernel, padding = _pair(given["kernel_size"]), _pair(given["padding"])
    if size[1] < _SHORT or math.prod(kernel) > _MOST_TAPS:
        return None
    return Lowered(full=context.call(fold_windows, context.value(x), size, kernel, padding))


def fold_windows(x: Tensor, size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """``F.fold`` of ``x`` ``[..., channels * kernel height * kernel width, windows]`` with a stride of one, to the bit:
    the sum of as many shifted images as a window has taps, in their order. What lies beyond the edge is left out."""
    *leading, depth, _ = x.shape
    channels = depth // math.prod(kernel)
    made = (side + 2 * around - length + 1 for side, around, length in zip(size, padding, kernel, strict=True))
    parts = x.reshape(*leading, channels, *kernel, *made)
    if x.stride(-2) < x.stride(-1):  # as a product leaves them: sums along channels
        out = x.new_zeros(*leading, *size, channels).movedim(-1, -3)
    else:
        out = x.new_zeros(*leading, channels, *size)
    down, across = (list(_taps(*sides)) for sides in zip(size, kernel, padding, strict=True))
    for i, rows, rows_read in down:
        for j, columns, columns_read in across:
            out[..., rows, columns].add_(parts[..., i, j, rows_read, columns_read])
    return out.contiguous()


def _taps(size: int, kernel: int, padding: int) -> Iterator[tuple[int, slice, slice]]:
    """Each tap of windows along a side that any pixel lies under: its number, the pixels, and the windows."""
    windows = size + 2 * padding - kernel + 1
    for tap in range(kernel):
        first, last = max(0, padding - tap), min(windows, size + padding - tap)
        if first < last:
            yield tap, slice(first + tap - padding, last + tap - padding), slice(first, last)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    """A number for each of height and width, where one may stand for both."""
    return sizes[0], sizes[-1]
