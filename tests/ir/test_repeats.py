"""Checks that stand for others: what is the same computation, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.build import Toolchain
from regraft.ir.capture import capture
from regraft.ir.driver import Driver, Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.pattern import relu
from regraft.ir.program import Program
from regraft.ir.rule import Match, Replacement, Rule
from regraft.ir.verify import Checked
from tests.ir.graphs import numbers

aten = torch.ops.aten


class Layers(nn.Module):
    """Two layers ``relu(x @ weight.T + bias)`` behind an activation, the second as ``change`` leaves it."""

    def __init__(self, change: Callable[[nn.Linear], Any] = lambda layer: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        with torch.no_grad():
            change(self.layers[1])

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()  # the input itself would be probed with its example
        for layer in self.layers:
            x = layer(x).relu()
        return x


class ReluAsMaximum(Rule):
    """relu over a linear layer, both written anew; ``bias`` says what becomes of the layer's bias."""

    name = "relu-as-maximum"
    exactness = Exactness.REASSOCIATED

    def __init__(self, keeps_bias: bool = True) -> None:
        self.keeps_bias = keeps_bias

    def pattern(self, x: Any) -> Any:
        return relu(x)

    def replace(self, match: Match, build: Builder) -> Replacement:
        linear = match.x
        operands = linear.args if self.keeps_bias else linear.args[:2]
        return build.call(aten.clamp_min.default, build.call(aten.linear.default, *operands), 0.0)


def rewritten(model: nn.Module, rule: Rule, checked: Checked | None = None) -> Session:
    """What happened to ``model`` under ``rule``."""
    program = capture(model.eval(), (numbers(4, 8),))
    session = Session(verify="each", checked=checked or Checked())
    Driver(program, [rule], session, "test").run()
    return session


def repeated(session: Session) -> list[bool]:
    """Whether each application's check was another's."""
    return [application.repeated for application in session.log.applications]


def test_a_layer_with_other_weights_repeats_the_check() -> None:
    session = rewritten(Layers(), ReluAsMaximum())
    assert repeated(session) == [False, True]
    first, second = session.log.applications
    assert first.drift == second.drift == 0.0


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("no bias", lambda layer: setattr(layer, "bias", None)),
        ("a bias that is one number", lambda layer: layer.bias.zero_()),
        ("another type", lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.t().contiguous().t()))),
    ],
)
def test_a_layer_that_differs_in_more_is_checked(what: str, change: Callable[[nn.Linear], Any]) -> None:
    assert repeated(rewritten(Layers(change), ReluAsMaximum())) == [False, False], what


def test_buffers_count_by_their_values() -> None:
    class Shifted(nn.Module):
        def __init__(self, other: float) -> None:
            super().__init__()
            self.register_buffer("one", torch.tensor([0.5]))
            self.register_buffer("two", torch.tensor([other]))

        def forward(self, x: Tensor) -> Tensor:
            return ((x.tanh() + self.one).relu() + self.two).relu()

    class Again(Rule):
        name = "again"

        def pattern(self, x: Any) -> Any:
            return relu(x)

        def replace(self, match: Match, build: Builder) -> Replacement:
            shifted = build.call(aten.add.Tensor, *match.x.args)
            return build.call(aten.clamp_min.default, shifted, 0.0)

    assert repeated(rewritten(Shifted(0.5), Again())) == [False, True]
    assert repeated(rewritten(Shifted(0.25), Again())) == [False, False]


def test_a_wrong_rewrite_is_never_a_precedent() -> None:
    session = rewritten(Layers(), ReluAsMaximum(keeps_bias=False))
    assert not session.log.applications
    assert len([refusal for refusal in session.log.refusals if refusal.kind == "rolled back"]) == 2


def test_every_check_is_computed_on_demand() -> None:
    assert repeated(rewritten(Layers(), ReluAsMaximum(), Checked(reused=False))) == [False, False]


def test_what_a_precedent_hides_is_found_by_the_whole_and_rolled_back() -> None:
    """The last layer's bias is almost nothing, so that losing it passes; the first layer's is lost by precedent."""

    class Pipeline:
        def run(self, program: Program, session: Session) -> dict[str, float]:
            Driver(program, [ReluAsMaximum(keeps_bias=False)], session, "test").run()
            return {}

    model = Layers(lambda layer: layer.bias.mul_(1e-9)).eval()
    x = numbers(4, 8)
    fast = regraft.compile(model, x, toolchain=Toolchain(pipeline=lambda target: Pipeline()))
    torch.testing.assert_close(fast(x), model(x))
    assert len(fast.report.applications) == 1
    assert [refusal.kind for refusal in fast.report.refusals] == ["rolled back"]
