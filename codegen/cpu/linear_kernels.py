"""The kernels that a linear layer can run on, each as nodes of the lowered graph.

``plain`` is ``aten.linear`` on the model's own weight; ``onednn`` multiplies with a weight packed by oneDNN; ``native``
is our own (``native/linear.cpp``), which wins where rows are few and costs no call of its own among its like. Packed
weights depend on neither batch nor length. Measured and not worth their copies: products with a transposed weight, and
1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Emitter
from regraft.codegen.cpu.native import linear as native_linear
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import linear_native
from regraft.ir.ops.activation import activate

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

#: Activation -> what oneDNN calls it: name and algorithm.
ONEDNN_ACTIVATIONS: dict[str, tuple[str, str]] = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
#: Activation -> the operator that computes it in place.
IN_PLACE: dict[str, Any] = {
    "relu": (aten.relu_.default, {}),
    "sigmoid": (aten.sigmoid_.default, {}),
    "tanh": (aten.tanh_.default, {}),
    "silu": (aten.silu_.default, {}),
    "gelu": (aten.gelu_.default, {}),
    "gelu_tanh": (aten.gelu_.default, {"approximate": "tanh"}),
}


@dataclass(frozen=True)
class LinearShape:
    """What the choice of a kernel depends on. ``rows`` is None where it is symbolic."""

    rows: int | None
    in_features: int
    out_features: int
    dtype: torch.dtype
    has_bias: bool = False
    activation: str = "none"
    has_multiplier: bool = False
    has_residual: bool = False


@dataclass(frozen=True)
class Operands:
    """The lowered operands of one linear layer, flat: ``x`` ``[rows, in]``, the epilogue's ``[rows, out]``."""

    x: fx.Node
    weight: Tensor
    bias: fx.Node | None
    multiplier: fx.Node | None
    residual: fx.Node | None
    activation: str
    rows: int | None
    hint: str


def plain(emit: Emitter, given: Operands) -> fx.Node:
    """aten.linear on the weight as it is; the epilogue works in place on the result."""
    weight = emit.bind(given.weight, given.hint)
    out = emit.call(aten.linear.default, given.x, weight, given.bias)
    return _epilogue(emit, given, _activated(emit, out, given.activation))


def onednn(emit: Emitter, given: Operands) -> fx.Node:
    """oneDNN's packed product; the epilogue works in place on the result, the first sum or product is fused."""
    return _onednn(emit, given, fuse_activation=False)


def onednn_fused(emit: Emitter, given: Operands) -> fx.Node:
    """oneDNN's packed product with the activation inside."""
    return _onednn(emit, given, fuse_activation=True)


def _onednn(emit: Emitter, given: Operands, fuse_activation: bool) -> fx.Node:
    packed = emit.bind(pack_onednn(given.weight), given.hint)
    binary, operand = _first_binary(given)
    if binary is not None:
        out = emit.call(mkldnn._linear_pointwise.binary, given.x, operand, packed, given.bias, binary)
        return out if binary == "add" else _epilogue(emit, given, out, multiplied=True)
    name, algorithm = ONEDNN_ACTIVATIONS[given.activation] if fuse_activation else ("none", "")
    out = emit.call(mkldnn._linear_pointwise.default, given.x, packed, given.bias, name, [], algorithm)
    if not fuse_activation:
        out = _activated(emit, out, given.activation)
    return _epilogue(emit, given, out)


def native(emit: Emitter, given: Operands) -> fx.Node:
    """Our own kernel, the whole epilogue inside."""
    packed = emit.bind(native_linear.pack(NATIVE.library(), given.weight), given.hint)
    epilogue = (given.bias, given.activation, given.multiplier, given.residual)
    return emit.call(linear_native, given.x, packed, given.weight.shape[0], *epilogue)


def _first_binary(given: Operands) -> tuple[str | None, fx.Node | None]:
    """The sum or product that can be fused: the one that comes first after the product with the weight."""
    if given.activation != "none":
        return None, None
    if given.multiplier is not None:
        return "mul", given.multiplier
    return ("add", given.residual) if given.residual is not None else (None, None)


def _activated(emit: Emitter, out: fx.Node, activation: str) -> fx.Node:
    if activation == "none":
        return out
    if activation in IN_PLACE:
        target, options = IN_PLACE[activation]
        return emit.call(target, out, **options)
    return emit.call(activate, out, activation)


def _epilogue(emit: Emitter, given: Operands, out: fx.Node, multiplied: bool = False) -> fx.Node:
    if given.multiplier is not None and not multiplied:
        out = emit.call(aten.mul_.Tensor, out, given.multiplier)
    return out if given.residual is None else emit.call(aten.add_.Tensor, out, given.residual)


def pack_onednn(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own layout; raises ``RuntimeError`` where oneDNN does not support the type."""
    packed: Tensor = mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


Kernel = Callable[[Emitter, Operands], fx.Node]

#: Kernels by name, in the order in which ties are broken: a kernel that needs no second copy of the weight first.
KERNELS: dict[str, Kernel] = {
    "plain": plain,
    "onednn": onednn,
    "onednn_fused": onednn_fused,
    "native": native,
}


def applicable(shape: LinearShape) -> list[str]:
    """Names of the kernels that can run a shape."""
    names = ["plain"]
    if shape.dtype != torch.float32:
        return names
    if shape.activation in native_linear.ACTIVATIONS and not NATIVE.missing():
        names.append("native")
    if not torch.backends.mkldnn.is_available():
        return names
    names.append("onednn")
    if shape.activation != "none" and shape.activation in ONEDNN_ACTIVATIONS:
        names.append("onednn_fused")
    return names
