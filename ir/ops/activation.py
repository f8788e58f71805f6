"""``regraft::activation``, and activations by name: the words that semantic operators carry as attributes.

An activation that ATen has stays ATen's (``aten.gelu``, ``aten.silu``…); the operator is for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from regraft.ir.nodes import arguments, schema_defaults
from regraft.ir.ops.registry import elementwise, register

aten = torch.ops.aten

#: Name -> function. "none" is the identity.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation called ``activation``; raises ``ValueError`` for a name that is not known."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation](x)


def reference(x: Tensor, activation: str) -> Tensor:
    """The definition; "none" is a copy, because no operator gives its operand."""
    out = activate(x, activation)
    return out.clone() if out is x else out


def _fake(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


activation = register("activation", "(Tensor x, str activation) -> Tensor", reference, _fake, elementwise(6))

_NAMES = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.elu.default: "elu",
    aten.leaky_relu.default: "leaky_relu",
    aten.softplus.default: "softplus",
}


def activation_name(node: Any) -> str | None:
    """The activation that a canonical node computes, None when it is no activation or one of other parameters than
    PyTorch's own."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.gelu.default:
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu"
    if node.target is activation:
        return str(arguments(node)["activation"])
    name = next((name for target, name in _NAMES.items() if node.target is target), None)
    defaults = schema_defaults(node.target)
    usual = name is not None and all(defaults.get(key, value) == value for key, value in arguments(node).items())
    return name if usual else None
