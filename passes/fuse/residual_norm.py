"""A residual sum and the norm that reads it become one operator with two results."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch

from regraft.ir import ops
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, rank, shape, sizes_equal
from regraft.ir.pattern import Call, add
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need

aten = torch.ops.aten


class _Block(torch.nn.Module):
    """A sum that a norm and the next layer read."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return self.norm(total), total


def _example() -> Any:
    generator = torch.Generator().manual_seed(0)
    return _Block(torch.nn.LayerNorm(8)), tuple(torch.randn(2, 3, 8, generator=generator) for _ in range(2))


class FuseResidualNorm(Rule):
    """norm(x + residual), with the sum read elsewhere too or not, is one add_norm."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, residual: Any) -> Any:
        return Call((ops.rms_norm, aten.layer_norm.default), (add(x, residual).named("total"),), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(sizes_equal(shape(match.x), shape(match.residual)), "one operand of the sum is broadcast")
        yield need(dtype(match.x) == dtype(match.residual), "the operands of the sum have different types")
        given = arguments(match.root)
        wide = len(given.get("normalized_shape", (1,)))
        yield need(wide == 1 and rank(match.total) >= 2, "the norm runs over more than one dim", at=match.root)
        first = min(match.total.users)
        yield need(first is match.root, "the sum is read before the norm", at=first)
        yield need(
            not any(match.weight_name(part) for part in (match.x, match.residual)), "a weight is added, no residual"
        )

    def replace(self, match: Match, build: Builder) -> Replacement:
        given = arguments(match.root)
        kind = "rms_norm" if match.root.target is ops.rms_norm else "layer_norm"
        options = {name: given[name] for name in ("offset", "cast") if name in given}
        both = build.call(
            ops.add_norm, match.x, match.residual, given["weight"], given.get("bias"), given["eps"], kind, **options
        )
        normed, total = (build.call(operator.getitem, both, place) for place in (0, 1))
        return {match.root: normed, match.total: total}

    examples = (Example("layer norm of a residual stream", _example),)
