"""Launcher of ``reversed_attention.cpp``: attention whose values go along transposed weights."""

from __future__ import annotations

import ctypes

from torch import Tensor

from regraft.codegen.cpu.native.call import FLOAT, LONG, POINTER, NativeCall, rows_of


class _Reversed(ctypes.Structure):
    """``Reversed`` in ``reversed_attention.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("query", "key", "value", "gates", "out")),
        *((name, LONG) for name in ("batch", "heads", "length", "keys", "head_dim", "value_dim")),
        *((f"{name}_strides", LONG * 3) for name in ("query", "key", "value", "gate", "out")),
        *((name, FLOAT) for name in ("scale", "softcap")),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the function returns."""
    library.regraft_reversed.restype = None


def reverse(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    scale: float,
    softcap: float,
) -> NativeCall:
    """``softmax(softcap(scale * query @ key^T))^T @ (gates * value)``: ``query`` ``[batch, heads, length, head_dim]``,
    ``key`` ``[batch, heads, keys, head_dim]``, ``value`` ``[batch, heads, length, value_dim]``, all fp32; ``gates``
    broadcast to ``[batch, heads, length, 1]``. The result is ``[batch, heads, keys, value_dim]``, in memory ``[batch,
    keys, heads, …]``."""
    query, key, value = (rows_of(part) for part in (query, key, value))
    batch, heads, length, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    shown = None if gates is None else gates.expand(batch, heads, length, 1)
    out = query.new_empty((batch, keys, heads, value_dim)).transpose(1, 2)
    tensors = (query, key, value, shown, out)
    strides = ((0, 0, 0) if tensor is None else tensor.stride()[:3] for tensor in tensors)
    values = (batch, heads, length, keys, head_dim, value_dim, *strides, scale, softcap)
    return NativeCall("regraft_reversed", _Reversed, tensors, values, out, (out,))
