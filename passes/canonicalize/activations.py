"""Activations written out that PyTorch has as one operator: Mish and hard swish."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, is_call
from regraft.ir.ops.activation import activation_name
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


@identity(aten.mul.Tensor, exactness=Exactness.REASSOCIATED)
def mish_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """x * tanh(softplus(x)) is mish(x)."""
    for x, opened in (node.args[:2], node.args[1::-1]):
        inner: Any = opened.args[0] if is_call(opened, (aten.tanh.default,)) else None  # type: ignore[union-attr]
        if activation_name(inner) == "softplus" and inner.args[0] is x:
            return build.call(aten.mish.default, x)
    return None


@identity(aten.mul.Tensor, aten.div.Tensor, exactness=Exactness.REASSOCIATED)
def hardswish_spelling(node: fx.Node, build: Builder) -> fx.Node | None:
    """x * clamp(x + 3, 0, 6) / 6, however it is grouped, is hardswish(x); so is x * hardsigmoid(x)."""
    product, whole = _unscaled(node)
    if not is_call(product, (aten.mul.Tensor,)):
        return None
    for x, opened in (product.args[:2], product.args[1::-1]):
        inner, part = _unscaled(opened)
        if is_call(inner, (aten.hardsigmoid.default,)) and (whole, part, inner.args[0]) == (1.0, 1.0, x):
            return build.call(aten.hardswish.default, x)
        if abs(whole * part - 1 / 6) < 1e-7 and _is_ramp(inner, x):
            return build.call(aten.hardswish.default, x)
    return None


def _unscaled(node: Any) -> tuple[Any, float]:
    """What is divided by or multiplied with a number, and that factor."""
    if is_call(node, (aten.div.Tensor, aten.mul.Tensor)) and isinstance(node.args[1], (int, float)) and node.args[1]:
        number = float(node.args[1])
        return node.args[0], 1 / number if node.target is aten.div.Tensor else number
    return node, 1.0


def _is_ramp(node: Any, x: Any) -> bool:
    """Whether a node is ``clamp(x + 3, 0, 6)``."""
    if not is_call(node, (aten.relu6.default, aten.hardtanh.default, aten.clamp.default)):
        return False
    given = arguments(node)
    bounds = (given.get("min", given.get("min_val", 0)), given.get("max", given.get("max_val", 6)))
    shifted = given["self"]
    if bounds != (0, 6) or not is_call(shifted, (aten.add.Tensor,)):
        return False
    return shifted.args[0] is x and shifted.args[1] == 3 and arguments(shifted)["alpha"] == 1


SPELLINGS = (mish_spelling, hardswish_spelling)
