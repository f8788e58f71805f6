"""Linear layers of overlapping slices of one tensor (each token beside the next) read the tensor itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, is_call, shape
from regraft.ir.pattern import anything, linear, operator
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.passes.fuse.cut import is_nearly_all

aten = torch.ops.aten


class LinearOfAllRows(Rule):
    """linear(x[:, a:b], w) is linear(x, w)[:, a:b], where nearly all rows are kept and another linear layer reads x,
    or nearly all of x, as well: no slice is copied for the product, and layers of one input are merged."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, weight: Any) -> Any:
        cut = operator(aten.slice.Tensor)
        return linear(
            cut(x, anything("dim"), anything("start"), anything("end")).named("rows"), weight, anything("bias")
        )

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(_keeps_nearly_all(match.rows), "few rows are kept, or features are cut", at=match.rows)
        yield need(len(_layers_of(match.x)) > 1, "no other linear layer reads the rows")

    def replace(self, match: Match, build: Builder) -> Replacement:
        given = arguments(match.root)
        whole = build.call(aten.linear.default, match.x, given["weight"], given["bias"])
        return build.call(aten.slice.Tensor, whole, *match.rows.args[1:])

    examples = (Example("each token beside the next", lambda: (_Neighbours(), (torch.randn(2, 40, 8),))),)


class _Neighbours(torch.nn.Module):
    """Two layers, one of all tokens but the last, one of all but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.before(x[:, :-1]) * self.after(x[:, 1:])
        return product


def _keeps_nearly_all(node: Any) -> bool:
    """Whether a node is a slice along any dim but the features, of numbers of rows that are known, nearly all."""
    if not is_call(node, (aten.slice.Tensor,)) or len(node.args) != 4 or node.args[1] == -1:
        return False
    return is_nearly_all(shape(node)[node.args[1]], shape(node.args[0])[node.args[1]])


def _layers_of(x: fx.Node) -> list[fx.Node]:
    """The linear layers that read ``x``, or nearly all of its rows."""
    views = [x, *filter(_keeps_nearly_all, x.users)]
    return [
        user
        for view in views
        for user in view.users
        if user.target is aten.linear.default and user.args[0] is view and user.users
    ]
