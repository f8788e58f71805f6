"""Lowering of what PyTorch is slow at for its size: copies of permuted dims, rows by number, many small products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native import copy
from regraft.codegen.cpu.native.kernels import FUSED
from regraft.codegen.cpu.native_operators import batched_native, reshaped_native
from regraft.ir.cost import node_cost
from regraft.ir.nodes import arguments, concrete, dtype, is_call, rank, shape, size_equal, sizes_equal, tensor_value

aten = torch.ops.aten

_WORTH_TURNING = 1 << 14  # elements; fewer cost less than the call
_LONG_RUN = 64  # elements side by side, which PyTorch copies as fast
_THIN, _LARGE = 32, 1024  # a product with a side this short, and none longer, is one that libraries are slow at
_FEWEST_PRODUCTS = 8


def lower_reshape(context: Context, node: fx.Node) -> Lowered | None:
    """A reshape that copies what lies across memory, or in short runs; None for others."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = tensor_value(source)
    elements = math.prod(concrete(size) for size in value.shape)
    if dtype(source) != torch.float32 or elements < _WORTH_TURNING or context.has_flat(source):
        return None
    run = concrete(value.shape[-1]) if concrete(value.stride(-1)) == 1 else 1
    if run >= _LONG_RUN or not node_cost(node).bytes or not context.can_unflatten(node) or FUSED.missing():
        return None
    return Lowered(full=context.call(reshaped_native, context.value(source), context.sizes(node)))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample by their number, natively."""
    return copy.gather_rows(FUSED.library(), x, index)


def lower_gather(context: Context, node: fx.Node) -> Lowered | None:
    """A gather whose index is one number for a whole row: tokens that were chosen, or put back."""
    given = arguments(node)
    x, index = given["self"], given["index"]
    if rank(x) != 3 or given["dim"] not in (1, -2) or dtype(x) != torch.float32:
        return None
    whole = is_call(index, (aten.expand.default,)) and size_equal(shape(index)[2], shape(x)[2])
    if not whole or math.prod(concrete(size) for size in shape(node)) < _WORTH_TURNING:
        return None
    numbers = index.args[0]
    single = rank(numbers) == 3 and size_equal(shape(numbers)[2], 1)
    every = single and sizes_equal(shape(numbers)[:2], shape(index)[:2]) and size_equal(shape(index)[0], shape(x)[0])
    if not every or FUSED.missing():
        return None
    return Lowered(full=context.call(gather_rows, context.value(x), context.value(numbers)))


def lower_matmul(context: Context, node: fx.Node) -> Lowered | None:
    """Many products with a short side; None for others."""
    operands = node.args[:2]
    if not all(isinstance(x, fx.Node) and rank(x) >= 3 and dtype(x) == torch.float32 for x in operands):
        return None
    left, right = operands
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    sizes = [*shape(left)[-2:], shape(right)[-1]]
    if not all(isinstance(size, int) for size in sizes) or 0 in sizes:
        return None
    count = math.prod(concrete(size) for size in shape(node)[:-2])
    fits = min(sizes) <= _THIN and max(sizes) <= _LARGE and count >= _FEWEST_PRODUCTS
    if not fits or FUSED.missing():
        return None
    return Lowered(full=context.call(batched_native, context.value(left), context.value(right)))
