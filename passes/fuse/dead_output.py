"""Outputs that nobody reads are not computed: a slice of a linear layer becomes a linear layer of a slice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, rank, shape, size_equal
from regraft.ir.pattern import Call, operator
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.ir.weights import WeightOp
from regraft.passes.fuse.cut import Cut, cut_around, cut_of, is_nearly_all
from regraft.passes.fuse.rows import rows_of

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


class _ClassToken(torch.nn.Module):
    """A pre-norm block of which only the first token is read, padding hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        self.query, self.key, self.value, self.out = (torch.nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        made = [part(self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        weights = (made[0] @ made[1].mT / 2).masked_fill(~there[:, None, None], float("-inf")).softmax(-1)
        x = x + self.out((weights @ made[2]).transpose(1, 2).flatten(2))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))
        return x[:, 0]


def _read_of(rows: fx.Node, reader: fx.Node, cut: Cut, around: Cut, build: Builder) -> fx.Node:
    """What ``reader`` reads, of the rows ``around`` alone."""
    start = cut.start - around.start
    if reader.target is aten.select.int:
        return build.call(aten.select.int, rows, cut.dim - rank(rows), start)
    return rows if cut == around else Cut(cut.dim, start, cut.length).of(rows, build)


class DropUnreadRows(Rule):
    """f(x)[:, a:b] is f(x[:, a:b]), where f makes each row of the same row of x: a linear layer, a norm, a sum, the
    queries of attention… Of a model's last layer little is left where only one token is read. Where several cuts are
    read, the rows around them all are computed."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, source: Any) -> Any:
        return Call(cut.targets, (source,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(cut_of(match.root) is not None, "all rows are read, or rows that are known at run time only")
        cuts = {user: cut_of(user) for user in match.source.users}
        read = [cut for cut in cuts.values() if cut is not None]
        around = cut_around(read) if len(read) == len(cuts) else None
        size = None if around is None else shape(match.source)[around.dim]
        others = around is None or size_equal(size, around.length)
        yield need(not others, "the other rows are read too", at=match.source)
        nearly = around is not None and is_nearly_all(around.length, size)
        yield need(not nearly, "nearly all rows are read", at=match.source)
        match.facts["read"] = cuts, around

    def replace(self, match: Match, build: Builder) -> Replacement:
        cuts, around = match.facts["read"]
        build.before = min(cuts)
        made = rows_of(match.source, around, build)
        if made is None:
            return None
        return {reader: _read_of(made, reader, cut, around, build) for reader, cut in cuts.items()}

    examples = (
        Example("the last token of a head", lambda: (_LastToken(), (torch.randn(2, 3, 8),))),
        Example(
            "a block of which one token is read",
            lambda: (_ClassToken(), (torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([[3], [5]]))),
        ),
    )


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
