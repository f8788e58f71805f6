"""Outputs that nobody reads are not computed: a slice of a linear layer becomes a linear layer of a slice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, rank
from regraft.ir.pattern import Call, operator
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.ir.weights import WeightOp

aten = torch.ops.aten
cut = operator(aten.slice.Tensor, aten.select.int)


def _product() -> Call:
    return Call((aten.linear.default,), loose=True, name="product")


class _LastToken(torch.nn.Module):
    """A language model's head of which only the last token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last: torch.Tensor = self.head(x)[:, -1]
        return last


class _FirstColumns(torch.nn.Module):
    """A head with columns that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        some: torch.Tensor = self.head(x)[..., 2:7]
        return some


class DropUnreadRows(Rule):
    """linear(x)[:, a:b] is linear(x[:, a:b]), along any dim but the features."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self) -> Any:
        return Call(cut.targets, (_product(),), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.sole_user("product"), "the other rows are read too", at=match.product)
        yield need(bool(arguments(match.root)["dim"] != -1), "features are cut, not rows")
        yield need(rank(match.root) >= 2, "a single row is left", at=match.root)

    def replace(self, match: Match, build: Builder) -> Replacement:
        given = arguments(match.product)
        rows = build.call(match.root.target, given["input"], *match.root.args[1:])  # type: ignore[arg-type]
        return build.call(aten.linear.default, rows, given["weight"], given["bias"])

    examples = (Example("the last token of a head", lambda: (_LastToken(), (torch.randn(2, 3, 8),))),)


class DropUnreadColumns(Rule):
    """linear(x)[..., a:b], when nothing else is read, needs rows a to b of the weight only."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self) -> Any:
        return Call((aten.slice.Tensor,), (_product(),), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.sole_user("product"), "the other columns are read too", at=match.product)
        yield need(len(match.root.args) == 4 and bool(match.root.args[1] == -1), "the cut is not a range of features")
        bounds = match.root.args[2:]
        yield need(all(isinstance(bound, int) for bound in bounds), "the bounds are symbolic")
        given = arguments(match.product)
        known = match.weight_name(given["weight"]) and (given["bias"] is None or match.weight_name(given["bias"]))
        yield need(bool(known), "weight or bias is computed at run time", at=match.product)

    def replace(self, match: Match, build: Builder) -> Replacement:
        given = arguments(match.product)
        start, end = match.root.args[2:]
        parts = []
        for node in (given["weight"], given["bias"]):
            name = match.weight_name(node)
            if name is not None:
                cut_rows = WeightOp("slice", (name,), {"dim": 0, "start": start, "end": end})
                parts.append(match.program.derive_weight(f"{name}.rows", cut_rows))
        return build.call(aten.linear.default, given["input"], *parts)

    examples = (Example("five of sixteen columns", lambda: (_FirstColumns(), (torch.randn(2, 3, 8),))),)
