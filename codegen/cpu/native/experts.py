"""Launcher of ``experts.cpp``: routed experts with a SiLU gate on packed weights."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER, NativeCall, rows_of
from regraft.codegen.cpu.native.panels import panels

_POINTERS = (
    *("hidden", "weight", "index", "gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    *("out", "workspace", "places"),
)
_NUMBERS = ("tokens", "top_k", "experts", "in", "inner", "hidden_stride")


class _Experts(ctypes.Structure):
    """``Experts`` in ``experts.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in _POINTERS),
        *((name, LONG) for name in _NUMBERS),
    )


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Weights in panels: ``gate`` and ``up`` ``[experts, panels, hidden, panel]``, ``down``
    ``[experts, panels, inner, panel]``, zeros behind the last column; biases ``[experts, …]``."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    inner: int


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions return."""
    library.regraft_experts_workspace.restype = LONG
    library.regraft_experts_workspace.argtypes = [LONG] * 3
    library.regraft_experts.restype = None


def pack(
    library: ctypes.CDLL,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> PackedExperts:
    """Weights ``[experts, in, out]`` and biases ``[experts, out]``, any strides, as the kernel reads them."""
    biases = [None if bias is None else bias.detach().float().contiguous() for bias in (gate_bias, up_bias, down_bias)]
    packed = [panels(library, weight) for weight in (gate, up, down)]
    return PackedExperts(packed[0], packed[1], packed[2], biases[0], biases[1], biases[2], gate.shape[2])


def run(library: ctypes.CDLL, packed: PackedExperts, hidden: Tensor, index: Tensor, weight: Tensor) -> NativeCall:
    """``regraft::moe`` of fp32 ``hidden [tokens, hidden]`` by ``index`` and fp32 ``weight [tokens, top_k]``."""
    tokens, size = hidden.shape
    top_k, experts = index.shape[1], packed.gate.shape[0]
    out = hidden.new_empty((tokens, size))
    rows, pairs, shares = rows_of(hidden), index.to(torch.int64).contiguous(), weight.contiguous()
    floats = library.regraft_experts_workspace(tokens * top_k, size, packed.inner)
    workspace = hidden.new_empty(floats)
    places = hidden.new_empty(tokens * top_k + experts + 1, dtype=torch.int64)
    weights = (packed.gate, packed.up, packed.down, packed.gate_bias, packed.up_bias, packed.down_bias)
    tensors = (rows, shares, pairs, *weights, out, workspace, places)
    values = (tokens, top_k, experts, size, packed.inner, rows.stride(0))
    return NativeCall("regraft_experts", _Experts, tensors, values, out, (out, workspace, places))
