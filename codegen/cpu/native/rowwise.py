"""Launchers of ``rowwise.cpp``. Every function takes fp32 tensors of any strides but the last, which is one."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_LONG, _FLOAT = ctypes.c_int64, ctypes.c_float
_Strides = _LONG * 3


class _Norm(ctypes.Structure):
    """``Norm`` in ``rowwise.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "total", "out")),
        *((name, _LONG) for name in ("rows", "size", "x_stride", "residual_stride")),
        ("eps", _FLOAT),
        ("offset", _FLOAT),
        ("centred", ctypes.c_int32),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take."""
    pointer, strides = ctypes.c_void_p, ctypes.POINTER(_LONG)
    library.regraft_rope.argtypes = [*[pointer] * 4, *[_LONG] * 6, *[strides] * 4]
    library.regraft_silu_glu.argtypes = [*[pointer] * 3, *[_LONG] * 4]
    for name in ("regraft_norm", "regraft_rope", "regraft_silu_glu"):
        getattr(library, name).restype = None


def norm(
    library: ctypes.CDLL,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(normed(x + residual) * (weight + offset) + bias, x + residual)`` over the last dim: LayerNorm where
    ``centred``, else RMSNorm; no sum without a residual. ``x`` and ``residual`` are ``[..., size]`` of one shape,
    ``weight`` and ``bias`` ``[size]``."""
    size = x.shape[-1]
    flat, x_stride = _rows(x, size)
    added, added_stride = (None, 0) if residual is None else _rows(residual, size)
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    tensors = (flat, added, _contiguous(weight), _contiguous(bias), total, out)
    given = _Norm(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        x.numel() // size if size else 0,
        size,
        x_stride,
        added_stride,
        eps,
        offset,
        centred,
    )
    library.regraft_norm(ctypes.byref(given))
    return out, total


def rope(library: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """Rotary embedding of paired halves. ``x`` is ``[batch, heads, length, head_dim]``; ``cos`` and ``sin`` broadcast
    to its leading dims and hold one value a pair or an entry. The result lies in memory as ``x`` does."""
    batch, heads, length, size = x.shape
    pairs = rotary_dim // 2
    source = x if x.stride(-1) == 1 else x.contiguous()
    tables = [_table(table, batch, heads, length) for table in (cos, sin)]
    out = torch.empty_strided(x.shape, _dense_strides(source), dtype=x.dtype)
    library.regraft_rope(
        source.data_ptr(),
        *(table.data_ptr() for table in tables),
        out.data_ptr(),
        batch,
        heads,
        length,
        size,
        pairs,
        pairs if cos.shape[-1] == rotary_dim else 0,
        *(_Strides(*tensor.stride()[:3]) for tensor in (source, *tables, out)),
    )
    return out


def silu_glu(library: ctypes.CDLL, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two tensors ``[..., size]`` of one shape."""
    size = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype)
    (gates, gate_stride), (ups, up_stride) = _rows(gate, size), _rows(up, size)
    rows = gate.numel() // size if size else 0
    library.regraft_silu_glu(gates.data_ptr(), ups.data_ptr(), out.data_ptr(), rows, size, gate_stride, up_stride)
    return out


def _rows(x: Tensor, size: int) -> tuple[Tensor, int]:
    """``x`` as rows of ``size`` at one stride; copied where it is not."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return (x if x.is_contiguous() else x.contiguous()), size


def _contiguous(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.is_contiguous() else table.contiguous()


def _table(table: Tensor, batch: int, heads: int, length: int) -> Tensor:
    wide = table.expand(batch, heads, length, table.shape[-1])
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _dense_strides(x: Tensor) -> list[int]:
    """Strides of a new tensor whose dims lie in memory in the order of ``x``'s, the last one innermost."""
    strides, step = [0] * x.dim(), x.shape[-1]
    strides[-1] = 1
    for dim in sorted(range(x.dim() - 1), key=lambda dim: (x.stride(dim), -dim)):
        strides[dim] = step
        step *= x.shape[dim]
    return strides
