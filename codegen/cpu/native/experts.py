"""Launcher of ``experts.cpp``: routed experts with a SiLU gate on packed weights."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.codegen.cpu.native.panels import panels

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_POINTERS = ("hidden", "weight", "index", "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "out", "workspace")
_NUMBERS = ("tokens", "top_k", "experts", "in", "inner", "hidden_stride")


class _Experts(ctypes.Structure):
    """``Experts`` in ``experts.cpp``, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in _POINTERS),
        ("places", _POINTER),
        *((name, _LONG) for name in _NUMBERS),
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
    library.regraft_experts_workspace.restype = _LONG
    library.regraft_experts_workspace.argtypes = [_LONG] * 3
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


def run(library: ctypes.CDLL, packed: PackedExperts, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``regraft::moe`` of fp32 ``hidden [tokens, hidden]`` by ``index`` and fp32 ``weight [tokens, top_k]``."""
    tokens, size = hidden.shape
    top_k, experts = index.shape[1], packed.gate.shape[0]
    out = torch.empty((tokens, size), dtype=hidden.dtype)
    rows = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    pairs = index.to(torch.int64).contiguous()
    shares = weight.contiguous()
    workspace = torch.empty(library.regraft_experts_workspace(tokens * top_k, size, packed.inner), dtype=hidden.dtype)
    places = torch.empty(tokens * top_k + experts + 1, dtype=torch.int64)
    tensors = (
        rows, shares, pairs, packed.gate, packed.up, packed.down,
        packed.gate_bias, packed.up_bias, packed.down_bias, out, workspace,
    )  # fmt: skip
    given = _Experts(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        places.data_ptr(),
        *(tokens, top_k, experts, size, packed.inner, rows.stride(0)),
    )
    library.regraft_experts(ctypes.byref(given))
    return out
