"""Launcher of ``batched.cpp``: many small matrix products at once."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER, NativeCall

_LANES = 16  # of the widest vectors: only which of two products is made depends on it
_RUN = 8  # elements side by side, which are packed four times as fast
#: Dims of an operand: batch, then rows, depth or columns, two of each.
BATCH, PAIR = 3, 2


class _Batched(ctypes.Structure):
    """``Batched`` in ``batched.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("a", "b", "out")),
        ("batch", LONG * BATCH),
        *((name, LONG * PAIR) for name in ("rows", "depth", "columns")),
        *((f"{name}_strides", LONG * (BATCH + 2 * PAIR)) for name in ("a", "b", "out")),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the function returns."""
    library.regraft_batched.restype = None


def batched(library: ctypes.CDLL, a: Tensor, b: Tensor) -> NativeCall:
    """``a @ b`` in fp32, ``[..., rows, depth]`` and ``[..., depth, columns]`` whose leading dims broadcast."""
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    sizes = (*leading, a.shape[-2], b.shape[-1])
    a, b = (_seven(x.expand(*leading, *x.shape[-2:])) for x in (a, b))
    return windows(library, a, b, range(BATCH + 2 * PAIR), sizes)


def windows(library: ctypes.CDLL, a: Tensor, b: Tensor, order: Sequence[int], sizes: Sequence[int]) -> NativeCall:
    """Products of ``a`` ``[batch (3 dims), rows (2), depth (2)]`` and ``b`` ``[batch (3), depth (2), columns (2)]``.
    The result lies in memory with the dims ``[batch, rows, columns]`` in ``order``, seen in the shape ``sizes``."""
    inner = BATCH + PAIR
    whole = (*a.shape[:inner], *b.shape[inner:])
    out = (a if a.is_meta else b).new_empty([whole[dim] for dim in order])
    placed = out.permute([list(order).index(dim) for dim in range(len(whole))])
    tensors = (a, b, placed)
    if _work(_turned(b), _turned(a)) < _work(a, b):
        tensors = (_turned(b), _turned(a), _turned(placed))
    left, right, _ = tensors
    pairs = (left.shape[BATCH:inner], left.shape[inner:], right.shape[inner:])
    strides = ((LONG * (BATCH + 2 * PAIR))(*tensor.stride()) for tensor in tensors)
    values = ((LONG * BATCH)(*a.shape[:BATCH]), *((LONG * PAIR)(*pair) for pair in pairs), *strides)
    return NativeCall("regraft_batched", _Batched, tensors, values, out.view(list(sizes)), (out,))


def _turned(x: Tensor) -> Tensor:
    return x.permute(0, 1, 2, 5, 6, 3, 4)


def _work(a: Tensor, b: Tensor) -> float:
    """Steps of one product: vectors multiplied, and elements packed."""
    rows, depth, columns = (math.prod(sizes) for sizes in (a.shape[3:5], a.shape[5:], b.shape[5:]))
    work = rows * depth * -(-columns // _LANES) + _packing(a, 1)
    return work + _packing(b, _LANES)


def _packing(x: Tensor, multiple: int) -> float:
    """Elements of one matrix that are packed, fewer where they lie in runs."""
    size, outer, inner = math.prod(x.shape[3:]), *x.shape[5:]
    run = inner if x.stride(6) == 1 or inner == 1 else 1
    if run == inner and (outer == 1 or x.stride(5) == inner) and (outer * inner) % multiple == 0:
        return 0
    return size / 4 if run >= _RUN else size


def _seven(x: Tensor) -> Tensor:
    """``[..., rows, columns]`` with three leading dims, joined where their strides allow it, else copied."""
    leading = x.shape[:-2]
    if len(leading) > BATCH:
        x = x.reshape(-1, *x.shape[-2:])
        leading = x.shape[:-2]
    for _ in range(BATCH - len(leading)):
        x = x.unsqueeze(0)
    return x.unsqueeze(3).unsqueeze(5)
