"""Weights as the native products read them: panels of columns, each contiguous."""

from __future__ import annotations

import ctypes

from torch import Tensor


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the function returns."""
    library.regraft_panel.restype = ctypes.c_int64


def panels(library: ctypes.CDLL, weight: Tensor) -> Tensor:
    """``weight`` ``[experts, in, out]`` as ``[experts, panels, in, panel]``."""
    width = int(library.regraft_panel())
    experts, rows, columns = weight.shape
    count = -(-columns // width)
    packed = weight.new_zeros((experts, count, rows, width))
    for number in range(count):
        part = weight[:, :, number * width : (number + 1) * width]
        packed[:, number, :, : part.shape[2]] = part
    return packed
