"""Launchers of ``rowwise.cpp``. Every function takes fp32 tensors of any strides but the last, which is one."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import FLOAT, INT, LONG, POINTER, NativeCall, rows_of
from regraft.codegen.cpu.native.linear import ACTIVATIONS


class _Rows(ctypes.Structure):
    """``Rows`` in ``rowwise.cpp``, field by field."""

    _fields_ = (("middle", LONG), ("inner", LONG), ("strides", LONG * 3))


class _Norm(ctypes.Structure):
    """``Norm`` in ``rowwise.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "residual", "weight", "bias", "total", "out")),
        *((name, LONG) for name in ("rows", "size")),
        *((name, _Rows) for name in ("x_rows", "residual_rows")),
        ("eps", FLOAT),
        ("offset", FLOAT),
        ("centred", INT),
        ("activation", INT),
    )


class _Rope(ctypes.Structure):
    """``Rope`` in ``rowwise.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "cos", "sin", "out")),
        *((name, LONG) for name in ("batch", "heads", "length", "size", "pairs", "second")),
        *((f"{name}_strides", LONG * 3) for name in ("x", "cos", "sin", "out")),
    )


class _Glu(ctypes.Structure):
    """``Glu`` in ``rowwise.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("gate", "up", "out")),
        *((name, LONG) for name in ("rows", "size")),
        *((name, _Rows) for name in ("gate_rows", "up_rows")),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions return."""
    for name in ("regraft_norm", "regraft_rope", "regraft_silu_glu"):
        getattr(library, name).restype = None


def norm(
    library: ctypes.CDLL,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    activation: str = "none",
) -> NativeCall:
    """``activation(normed(x) * (weight + offset) + bias)`` over the last dim: LayerNorm where ``centred``, else RMSNorm
    (in fp32 all flavours are the same). ``x`` is ``[..., size]``, ``weight`` and ``bias`` ``[size]``."""
    out = x.new_empty(x.shape)
    return _norm(x, None, weight, bias, None, out, (eps, offset, centred, ACTIVATIONS[activation]))


def add_norm(
    library: ctypes.CDLL,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> NativeCall:
    """``(norm of x + residual, x + residual)``, of one shape: each row is read once."""
    out = x.new_empty(x.shape)
    return _norm(x, residual, weight, bias, torch.empty_like(out), out, (eps, offset, centred, ACTIVATIONS["none"]))


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    options: tuple[float, float, bool, int],
) -> NativeCall:
    size = x.shape[-1]
    source, x_rows = _rows(x)
    added, added_rows = (None, _ONE_ROW) if residual is None else _rows(residual)
    tensors = (source, added, _contiguous(weight), _contiguous(bias), total, out)
    values = (x.numel() // size if size else 0, size, x_rows, added_rows, *options)
    if total is None:
        return NativeCall("regraft_norm", _Norm, tensors, values, out, (out,))
    return NativeCall("regraft_norm", _Norm, tensors, values, (out, total), (out, total))


def rope(library: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> NativeCall:
    """Rotary embedding of paired halves. ``x`` is ``[batch, heads, length, head_dim]``; ``cos`` and ``sin`` broadcast
    to its leading dims and hold one value a pair or an entry. The result lies in memory as ``x`` does."""
    batch, heads, length, size = x.shape
    pairs = rotary_dim // 2
    source = rows_of(x)
    tables = [_table(table, batch, heads, length) for table in (cos, sin)]
    out = x.new_empty_strided(x.shape, _dense_strides(source))
    tensors = (source, *tables, out)
    second = pairs if cos.shape[-1] == rotary_dim else 0
    strides = (tensor.stride()[:3] for tensor in tensors)
    values = (batch, heads, length, size, pairs, second, *strides)
    return NativeCall("regraft_rope", _Rope, tensors, values, out, (out,))


def silu_glu(library: ctypes.CDLL, gate: Tensor, up: Tensor) -> NativeCall:
    """``silu(gate) * up`` of two tensors ``[..., size]`` of one shape."""
    size = gate.shape[-1]
    out = gate.new_empty(gate.shape)
    (gates, gate_rows), (ups, up_rows) = _rows(gate), _rows(up)
    values = (gate.numel() // size if size else 0, size, gate_rows, up_rows)
    return NativeCall("regraft_silu_glu", _Glu, (gates, ups, out), values, out, (out,))


_ONE_ROW = (1, 1, (0, 0, 0))


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int, tuple[int, ...]]]:
    """``x`` as the rows of its last dim, and where they lie as ``Rows`` has it; copied where three dims cannot say."""
    dims: list[list[int]] = []  # size and stride of the leading dims, neighbours that lie on as one
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = [dims[-1][0] * size, stride]
        elif size != 1:
            dims.append([size, stride])
    if len(dims) > 3 or (x.stride(-1) != 1 and x.shape[-1] != 1):
        return x.contiguous(), (1, 1, (x.shape[-1], 0, 0))
    if len(dims) < 2:
        return x, (1, 1, (dims[0][1] if dims else 0, 0, 0))
    (_, first), (middle, second), (inner, third) = dims if len(dims) == 3 else ([1, 0], *dims)
    return x, (middle, inner, (first, second, third))


def _contiguous(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.is_contiguous() else table.contiguous()


def _table(table: Tensor, batch: int, heads: int, length: int) -> Tensor:
    return rows_of(table.expand(batch, heads, length, table.shape[-1]))


def _dense_strides(x: Tensor) -> list[int]:
    """Strides of a new tensor whose dims lie in memory in the order of ``x``'s, the last one innermost."""
    strides, step = [0] * x.dim(), x.shape[-1]
    strides[-1] = 1
    for dim in sorted(range(x.dim() - 1), key=lambda dim: (x.stride(dim), -dim)):
        strides[dim] = step
        step *= x.shape[dim]
    return strides
