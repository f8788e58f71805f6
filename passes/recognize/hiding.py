"""Whether a bias may be a mask in disguise: may it hold numbers so low that a key gets no weight?"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import dtype, is_tensor
from regraft.ir.program import Program

aten = torch.ops.aten

#: Beside any score, a number this low gets no weight.
_HIDES = -1e4
_LIMIT = 256

#: What these give is as modest as activations are.
_MODEST = (
    aten.embedding.default,
    aten.linear.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.convolution.default,
    aten.layer_norm.default,
    aten.softmax.int,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.sin.default,
    aten.cos.default,
)


def may_hide(node: fx.Node, program: Program) -> bool:
    """Whether ``node`` may hold numbers that hide keys: a float input of the model, or what is made with a low
    constant or a logarithm. Parameters and activations do not."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen or not is_tensor(node) or not dtype(node).is_floating_point:
            continue
        seen.add(node)
        if len(seen) > _LIMIT:
            return True
        if node.op == "placeholder":
            if _input_may_hide(node, program):
                return True
        elif node.target not in _MODEST:
            if node.target is aten.log.default or any(map(_is_low, (*node.args, *node.kwargs.values()))):
                return True
            pending += node.all_input_nodes
    return False


def _input_may_hide(node: fx.Node, program: Program) -> bool:
    name = program.weight_name(node)
    if name is None:
        return True
    if name in program.parameters():
        return False
    value = program.weights.get(name)
    return value.numel() > 0 and bool((value <= _HIDES).any())


def _is_low(argument: Any) -> bool:
    return isinstance(argument, (int, float)) and argument <= _HIDES
