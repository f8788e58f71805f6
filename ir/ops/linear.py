"""``regraft::linear``: a linear layer and its epilogue, ``activation(x @ weight.T + bias) * multiplier + residual``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments
from regraft.ir.ops.activation import activate
from regraft.ir.ops.registry import Cost, elements, register, traffic


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The definition. ``x`` is ``[..., in]``, ``weight`` ``[out, in]``, ``multiplier`` and ``residual`` have the
    output's shape ``[..., out]``."""
    out = activate(torch.nn.functional.linear(x, weight, bias), activation)
    if multiplier is not None:
        out = out * multiplier
    return out if residual is None else out + residual


def _fake(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def cost(node: fx.Node) -> Cost:
    """Two operations for each multiply-add."""
    weight = arguments(node)["weight"].meta["val"]
    return Cost(2.0 * elements(node.meta["val"]) * elements(weight) / weight.shape[0], traffic(node))


linear = register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? multiplier=None, Tensor? residual=None, "
    "str activation='none') -> Tensor",
    reference,
    _fake,
    cost,
)
