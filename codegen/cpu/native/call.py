"""A call of a native kernel as data: what its structure holds, and which tensors it makes.

Launchers describe; running is one line. A description made from tensors on the meta device has strides and sizes but no
addresses: ``tape.py`` lays out memory for a sequence of them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


@dataclass(slots=True)
class NativeCall:
    """``function(structure)``: the structure's first fields are the addresses of ``tensors``, then come ``values``.

    ``result`` is what the caller gets; ``made`` are the tensors that the description allocated, whose contents the
    kernel writes (results and workspace). All others are only read, ``panels`` being a packed weight among them,
    ``[panels, depth, panel]``.
    """

    function: str
    structure: type[ctypes.Structure]
    tensors: tuple[Tensor | None, ...]
    values: tuple[Any, ...]
    result: Any
    made: tuple[Tensor, ...]
    panels: Tensor | None = None

    def run(self, library: ctypes.CDLL) -> Any:
        """Make the call; returns the result."""
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        getattr(library, self.function)(ctypes.byref(self.structure(*addresses, *self.values)))
        return self.result


def rows_of(x: Tensor) -> Tensor:
    """``x`` with its last dim dense: kernels take any other stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
