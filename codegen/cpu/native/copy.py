"""Launchers of ``copy.cpp``: the copy that a reshape of permuted dims makes, and rows by their number."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER, NativeCall, rows_of

MOST_DIMS = 8


class _Copy(ctypes.Structure):
    """``Copy`` in ``copy.cpp``, field by field."""

    _fields_ = (
        ("x", POINTER),
        ("out", POINTER),
        ("dims", LONG),
        *((name, LONG * MOST_DIMS) for name in ("sizes", "strides", "out_strides")),
    )


class _Gather(ctypes.Structure):
    """``Gather`` in ``copy.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "index", "out", "wrong")),
        *((name, LONG) for name in ("batch", "tokens", "count", "width")),
        ("x_strides", LONG * 2),
        ("index_strides", LONG * 2),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions return."""
    library.regraft_copy.restype = None
    library.regraft_gather_rows.restype = None


def gather_rows(library: ctypes.CDLL, x: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = x[b, index[b, i, 0]]`` of ``x`` ``[batch, tokens, width]`` in fp32. Raises ``IndexError`` where
    PyTorch does: what the kernel found is looked at, so the call is made at once."""
    batch, tokens, width = x.shape
    x, index = rows_of(x), index.squeeze(-1)
    out, wrong = x.new_empty((*index.shape, width)), torch.zeros(1, dtype=torch.int64)
    values = (batch, tokens, index.shape[1], width, x.stride()[:2], index.stride())
    NativeCall("regraft_gather_rows", _Gather, (x, index, out, wrong), values, out, (out, wrong)).run(library)
    place = int(wrong) - 1
    if place >= 0:
        raise IndexError(f"index {int(index.flatten()[place])} is out of bounds for dimension 1 with size {tokens}")
    return out


def reshaped(library: ctypes.CDLL, x: Tensor, sizes: Sequence[int]) -> NativeCall:
    """A dense copy of ``x``, whose elements have four bytes, in the shape ``sizes`` (one of which may be -1)."""
    whole = x.new_empty(x.shape)
    out = whole.view(list(sizes))
    dims = _joined(x, whole)
    if len(dims) > MOST_DIMS:
        x = x.contiguous()
        dims = _joined(x, whole)
    dims = _blocked(dims)
    filled = [*(list(item) for item in zip(*dims, strict=True))]
    values = (len(dims), *((LONG * MOST_DIMS)(*numbers) for numbers in filled))
    return NativeCall("regraft_copy", _Copy, (x, whole), values, out, (whole,))


_Dim = tuple[int, int, int]


def _joined(x: Tensor, out: Tensor) -> list[_Dim]:
    """Size, stride and the result's stride of each dim; neighbours that lie on in both as one."""
    dims: list[_Dim] = []
    for size, stride, to in zip(x.shape, x.stride(), out.stride(), strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == stride * size:
            dims[-1] = (dims[-1][0] * size, stride, to)
        else:
            dims.append((size, stride, to))
    return dims


def _blocked(dims: list[_Dim]) -> list[_Dim]:
    """The dim along which ``x`` is densest in front of the last one, along which the result is."""
    if len(dims) < 2:
        return [(1, 0, 0)] * (2 - len(dims)) + dims if dims else [(1, 0, 0), (1, 1, 1)]
    inner = dims[:-1]
    dense = min(range(len(inner)), key=lambda place: (inner[place][1] or 1 << 62, -place))
    if dims[-1][1] == 1:  # rows are copied: the block is whatever lies before them
        dense = len(inner) - 1
    return [*inner[:dense], *inner[dense + 1 :], inner[dense], dims[-1]]
