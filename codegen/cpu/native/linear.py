"""Launcher of ``linear.cpp``: a linear layer with its epilogue on a packed weight."""

from __future__ import annotations

import ctypes

from torch import Tensor

from regraft.codegen.cpu.native.call import INT, LONG, POINTER, NativeCall, rows_of
from regraft.codegen.cpu.native.panels import panels

_POINTERS = ("x", "weight", "bias", "multiplier", "residual", "out")
_NUMBERS = ("rows", "depth", "columns", "x_stride", "multiplier_stride", "residual_stride")
#: Activation -> its number in ``linear.cpp``.
ACTIVATIONS = {
    name: number
    for number, name in enumerate(
        ("none", "relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu_squared")
    )
}


class _Linear(ctypes.Structure):
    """``Linear`` in ``linear.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in _POINTERS),
        *((name, LONG) for name in _NUMBERS),
        ("activation", INT),
        ("next", POINTER),
        ("next_panels", LONG),
        ("next_panel", LONG),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the function returns."""
    library.regraft_linear.restype = None


def pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
    """``weight`` ``[out, in]`` in panels, ``[panels, in, panel]``."""
    return panels(library, weight.detach().t()[None])[0]


def linear(
    library: ctypes.CDLL,
    x: Tensor,
    packed: Tensor,
    columns: int,
    bias: Tensor | None,
    activation: str,
    multiplier: Tensor | None,
    residual: Tensor | None,
) -> NativeCall:
    """``activation(x @ weight.T + bias) * multiplier + residual`` in fp32: ``x`` ``[rows, in]``, the others
    ``[rows, columns]``, all of any row stride; ``packed`` comes from :func:`pack`."""
    rows, depth = x.shape
    out = x.new_empty((rows, columns))
    x = rows_of(x)
    multiplier = None if multiplier is None else rows_of(multiplier)
    residual = None if residual is None else rows_of(residual)
    strides = (0 if operand is None else operand.stride(0) for operand in (x, multiplier, residual))
    values = (rows, depth, columns, *strides, ACTIVATIONS[activation])
    tensors = (x, packed, bias, multiplier, residual, out)
    return NativeCall("regraft_linear", _Linear, tensors, values, out, (out,), panels=packed)
