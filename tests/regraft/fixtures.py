"""A tiny model and rules over it, of which one is wrong on purpose and one raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.pattern import relu, sigmoid, tanh
from regraft.ir.program import Program
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.base import Pass, Pipeline, RulePass

aten = torch.ops.aten


class Tiny(nn.Module):
    """relu, then sigmoid, then tanh of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {"y": torch.tanh(torch.sigmoid(torch.relu(self.linear(input))))}


@dataclass
class Source:
    """A model with its example inputs."""

    model: Any = field(default_factory=lambda: Tiny().eval())
    args: tuple[Any, ...] = field(default_factory=lambda: (torch.ones(2, 4),))
    kwargs: dict[str, Any] = field(default_factory=dict)


def factory() -> tuple[nn.Module, tuple[Any, ...]]:
    """What ``package.module:factory`` names on the command line."""
    return Tiny().eval(), (torch.ones(2, 4),)


def broken_factory() -> nn.Module:
    """A factory that raises."""
    raise RuntimeError("no weights today")


class ClampRelu(Rule):
    """relu is a clamp from below: right."""

    exactness = Exactness.BITWISE
    recognizes = "clamp"

    def pattern(self, x: Any) -> Any:
        return relu(x)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.clamp_min.default, match.x, 0)


class SigmoidIsTanh(Rule):
    """Wrong on purpose."""

    def pattern(self, x: Any) -> Any:
        return sigmoid(x)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.tanh.default, match.x)


class NeverTanh(Rule):
    """Refuses every site."""

    recognizes = "hyperbolic"

    def pattern(self, x: Any) -> Any:
        return tanh(x)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(False, "tanh is wanted as it is", at=match.root)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return None


@dataclass(frozen=True)
class Right(RulePass):
    """What changes nothing, and what refuses."""

    rules: ClassVar[tuple[Rule, ...]] = (ClampRelu(), NeverTanh())


@dataclass(frozen=True)
class Wrong(RulePass):
    """What changes the result."""

    rules: ClassVar[tuple[Rule, ...]] = (SigmoidIsTanh(),)


@dataclass(frozen=True)
class RaisesAfterClamp(Pass):
    """Fails as soon as it meets what ``ClampRelu`` made."""

    def run(self, program: Program, session: Session) -> int:
        if any(self._is_clamp(node) for node in program.graph.nodes):
            raise KeyError("clamp")
        return 0

    @staticmethod
    def _is_clamp(node: fx.Node) -> bool:
        return node.target is aten.clamp_min.default


RIGHT = Pipeline((Right(),))
WRONG = Pipeline((Right(), Wrong()))
RAISING = Pipeline((Right(), RaisesAfterClamp()))
