"""The walk along the token axis: from an attention site through all that depends on it, node by node.

What a node does follows from where the tokens lie in its operands. An operator that is not known is a barrier, so that
what is accepted is right whatever model it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import sizes_equal
from regraft.ir.pointwise import is_pointwise
from regraft.passes.tokens import layout as axis
from regraft.passes.tokens.axis_rules import RULES, pointwise
from regraft.passes.tokens.layout import Layout
from regraft.passes.tokens.step import Duty, Kind, Step, barrier


@dataclass
class Walk:
    """The layouts of what depends on the tokens, and the step of every node that reads such a value, in graph order.

    ``tokens`` is the length of the sequence. Nodes that are not in ``layouts`` hold no reduced tokens: they come from
    elsewhere, or lie behind a barrier, where every token is back.
    """

    tokens: int
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    steps: dict[fx.Node, Step] = field(default_factory=dict)

    @classmethod
    def behind(cls, start: fx.Node, layout: Layout, tokens: int) -> Walk:
        """All that comes behind ``start``, whose result has this layout."""
        walk = cls(tokens, {start: layout})
        node = start.next
        while node.op != "root":
            walk.step(node)
            node = node.next
        return walk

    def of(self, node: Any) -> Layout | None:
        """The layout of an operand, None where it holds no tokens of the walk."""
        return self.layouts.get(node) if isinstance(node, fx.Node) else None

    def moving(self, node: fx.Node) -> list[fx.Node]:
        """The operands that hold tokens."""
        return [source for source in node.all_input_nodes if source in self.layouts]

    def step(self, node: fx.Node) -> None:
        """Find out what ``node`` does; a node that reads no tokens is passed over."""
        if node.op == "placeholder" or not self.moving(node):
            return
        found = self._step(node)
        self.steps[node] = found
        if found.layout is not None:
            self.layouts[node] = found.layout

    def _step(self, node: fx.Node) -> Step:
        if node.op == "output":
            return barrier("every token is an output")
        if node.target is torch.ops.aten.sym_size.int:
            return Step(Kind.EQUIVARIANT, Duty.SAME)
        rule = RULES.get(node.target)
        if rule is None and is_pointwise(node):
            rule = pointwise
        if rule is None:
            return barrier(f"{node.target} is not known to treat each token alike")
        found = rule(self, node)
        layout = found.layout
        if layout is None:
            return found
        value = node.meta["val"]
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(part, torch.Tensor) or not sizes_equal(axis.sizes(layout), part.shape):
                return barrier(f"{node.target} changes the tokens or the batch in a way that is not understood")
        if axis.count_spans(layout) > 1:
            return barrier("tokens are paired with tokens")
        return found
