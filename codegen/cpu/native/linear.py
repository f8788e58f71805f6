"""Launcher of ``linear.cpp``: a linear layer with its epilogue on a packed weight."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regraft.codegen.cpu.native.panels import panels

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
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
        *((name, _POINTER) for name in _POINTERS),
        *((name, _LONG) for name in _NUMBERS),
        ("activation", ctypes.c_int32),
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
) -> Tensor:
    """``activation(x @ weight.T + bias) * multiplier + residual`` in fp32: ``x`` ``[rows, in]``, the others
    ``[rows, columns]``, all of any row stride; ``packed`` comes from :func:`pack`."""
    rows, depth = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype)
    x = _rows(x)
    multiplier = None if multiplier is None else _rows(multiplier)
    residual = None if residual is None else _rows(residual)
    tensors = (x, packed, bias, multiplier, residual, out)
    given = _Linear(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        rows,
        depth,
        columns,
        x.stride(0),
        0 if multiplier is None else multiplier.stride(0),
        0 if residual is None else residual.stride(0),
        ACTIVATIONS[activation],
    )
    library.regraft_linear(ctypes.byref(given))
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
