"""PyTorch's fused operators, of whose results inference reads the first: the operators that they are parts of."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, is_call
from regraft.ir.pattern import Call, operator
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten
first_of = operator(python_operator.getitem)


@identity(python_operator.getitem)
def norm_without_its_moments(node: fx.Node, build: Builder) -> fx.Node | None:
    """The first of what native_layer_norm gives is layer_norm."""
    source: Any = node.args[0]
    if not is_call(source, (aten.native_layer_norm.default,)) or any(user.args[1] for user in source.users):
        return None
    given = arguments(source)
    sizes, weight, bias = given["normalized_shape"], given["weight"], given["bias"]
    return build.call(aten.layer_norm.default, given["input"], sizes, weight, bias, given["eps"])


class AttentionWithoutItsLogSums(Rule):
    """The first of what the CPU's flash attention gives is scaled_dot_product_attention."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self) -> Any:
        return first_of(Call((aten._scaled_dot_product_flash_attention_for_cpu.default,), loose=True, name="call"), 0)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.sole_user("call"), "the log-sum-exps are read too")

    def replace(self, match: Match, build: Builder) -> Replacement:
        given = arguments(match.call)
        operands = (given[name] for name in ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
        return build.call(aten.scaled_dot_product_attention.default, *operands, scale=given["scale"])


SPELLINGS = (norm_without_its_moments, AttentionWithoutItsLogSums())
