"""What a model asserts of values while it runs: kept, and told apart from errors of ours, so that the original can take
over. A graph of fixed sizes has room for so much (the chunks of a text); what does not fit must not be left out."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.ir.errors import FailedAssertion
from regraft.ir.nodes import arguments

aten = torch.ops.aten

#: The calls that are lowered to ``require``.
ASSERTIONS = (aten._assert_async.default, aten._assert_async.msg)


def require(condition: Tensor, message: str) -> None:
    """Raise ``FailedAssertion`` where ``condition``, one value, is false or zero."""
    if not condition:
        raise FailedAssertion(message)


torch.fx.node.has_side_effect(require)


def lower_assertion(context: Context, node: fx.Node) -> Lowered:
    """An assertion, at its place among the calls."""
    given = arguments(node)
    message = given.get("assert_msg") or f"an assertion on {given['self'].name} failed"
    return Lowered(full=context.call(require, context.value(given["self"]), message))
