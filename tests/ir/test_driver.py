"""The driver: order, end, fuel, provenance, refusals as data, and taking back what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir.driver import Driver, Fuel, RewriteLoop, Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.pattern import Call, add, matmul, mul, relu, scalar, sigmoid, softmax, sub, tanh
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from tests.ir.graphs import numbers, program_of, short, targets
from tests.support import run

aten = torch.ops.aten
X = numbers(2, 3)


class ReluIsClamp(Rule):
    """relu(x) is clamp(x, 0): right, to the bit."""

    exactness = Exactness.BITWISE

    def pattern(self, x: Any) -> Any:
        return relu(x)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.clamp.default, match.x, 0)


class ReluOfTanh(Rule):
    """relu(tanh(x)) is tanh(relu(x))."""

    def pattern(self, x: Any) -> Any:
        return relu(tanh(x))

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.tanh.default, build.call(aten.relu.default, match.x))


def drive(program: Program, *rules: Rule, fuel: int | None = None, verify: str = "each") -> Session:
    session = Session(fuel=Fuel(fuel), verify=verify)
    Driver(program, rules, session, "test").run()
    return session


def operators(program: Program) -> list[str]:
    return [short(target) for target in targets(program)]


def stacked(x: Tensor) -> Tensor:
    return (x.relu() + 1).relu().sigmoid().relu()


def test_applies_until_nothing_is_left() -> None:
    program = program_of(stacked, X)
    session = drive(program, ReluIsClamp())
    assert operators(program) == ["clamp", "add.Tensor", "clamp", "sigmoid", "clamp"]
    assert session.applied == session.log.of("relu-is-clamp").fired == 3
    torch.testing.assert_close(run(program, (X,)), stacked(X))


def test_largest_pattern_at_a_site_goes_first() -> None:
    class SigmoidOfRelu(Rule):
        def pattern(self, x: Any) -> Any:
            return sigmoid(relu(x))

        def replace(self, match: Match, build: Builder) -> Replacement:
            return build.call(aten.sigmoid.default, build.call(aten.clamp.default, match.x, 0))

    program = program_of(lambda x: x.relu().sigmoid(), X)
    session = drive(program, ReluIsClamp(), SigmoidOfRelu())
    assert [a.rule for a in session.log.applications] == ["sigmoid-of-relu"]


def test_rules_before_others_win_at_one_node() -> None:
    program = program_of(lambda x: x.tanh().relu(), X)
    session = drive(program, ReluOfTanh(), ReluIsClamp())
    assert [a.rule for a in session.log.applications] == ["relu-of-tanh", "relu-is-clamp"]


def test_new_nodes_are_tried_again() -> None:
    program = program_of(lambda x: x.tanh().tanh().tanh().relu(), X)
    drive(program, ReluOfTanh())
    assert operators(program) == ["relu", "tanh", "tanh", "tanh"]


def test_rules_that_undo_each_other_are_stopped() -> None:
    class TanhOfRelu(Rule):
        def pattern(self, x: Any) -> Any:
            return tanh(relu(x))

        def replace(self, match: Match, build: Builder) -> Replacement:
            return build.call(aten.relu.default, build.call(aten.tanh.default, match.x))

    program = program_of(lambda x: x.tanh().relu(), X)
    with pytest.raises(RewriteLoop, match=r"pass test applied \d+ rewrites and did not come to an end"):
        drive(program, ReluOfTanh(), TanhOfRelu())


@pytest.mark.parametrize("fuel", [0, 1, 2, 3, 9])
def test_fuel_bounds_the_number_of_applications(fuel: int) -> None:
    program = program_of(stacked, X)
    session = drive(program, ReluIsClamp(), fuel=fuel)
    assert session.applied == operators(program).count("clamp") == min(fuel, 3)
    torch.testing.assert_close(run(program, (X,)), stacked(X))


def test_application_records_where_it_came_from() -> None:
    program = program_of(stacked, X)
    session = drive(program, ReluIsClamp())

    first = session.log.applications[0]
    assert (first.number, first.pass_name, first.exactness, first.drift) == (1, "test", "bitwise", 0.0)
    assert first.source_nodes == ("relu_2",) and first.new_nodes == ("clamp_default",)
    assert first.user_line == f"{__file__}:{stacked.__code__.co_firstlineno + 1} in stacked"


def test_new_nodes_carry_the_history_of_what_they_replace() -> None:
    program = program_of(lambda x: x.tanh().relu(), X)
    drive(program, ReluOfTanh(), ReluIsClamp())

    clamp = next(node for node in program.graph.nodes if node.target is aten.clamp.default)
    assert clamp.meta["provenance"] == ("relu-of-tanh(relu, tanh)", "relu-is-clamp(relu_default)")
    assert "stack_trace" in clamp.meta and clamp.meta["val"].shape == X.shape


def test_inputs_that_nothing_reads_any_more_are_erased() -> None:
    class DropGate(Rule):
        exactness = Exactness.LOSSY

        def pattern(self, x: Any, gate: Any) -> Any:
            return mul(x, sigmoid(gate))

        def replace(self, match: Match, build: Builder) -> Replacement:
            return build.call(aten.relu.default, match.x)

    program = program_of(lambda x, gate: x * gate.tanh().exp().sigmoid(), X, X)
    drive(program, DropGate())
    assert operators(program) == ["relu"]


def test_one_rewrite_may_replace_several_nodes() -> None:
    class Twins(Rule):
        """x.relu() of two readers becomes one clamp."""

        def pattern(self, x: Any) -> Any:
            return relu(x)

        def replace(self, match: Match, build: Builder) -> Replacement:
            twins = sorted(node for node in match.x.users if node.target is aten.relu.default)
            build.before = twins[0]
            shared = build.call(aten.clamp.default, match.x, 0)
            return dict.fromkeys(twins, shared)

    program = program_of(lambda x: (x.relu().sin(), x.relu().cos()), X)
    session = drive(program, Twins())
    assert operators(program) == ["clamp", "sin", "cos"] and session.applied == 1


def test_none_leaves_the_graph_as_it_is() -> None:
    class Hesitant(Rule):
        def pattern(self, x: Any) -> Any:
            return relu(x)

        def replace(self, match: Match, build: Builder) -> Replacement:
            build.call(aten.clamp.default, match.x, 0)
            return None

    program = program_of(stacked, X)
    session = drive(program, Hesitant())
    assert "clamp" not in operators(program) and session.applied == 0 and not session.log.refusals


class Attention(Rule):
    """softmax(x @ y) @ z, refused unless it is square."""

    recognizes = "attention"
    landmark = "weights"

    def pattern(self, x: Any, y: Any, z: Any) -> Any:
        return matmul(softmax(matmul(x, y), -1).named("weights"), z)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(True, "never seen")
        square = match.x.meta["val"].shape[0] == match.x.meta["val"].shape[1]
        yield need(square, "the query is not square", at=match.x)
        yield need(False, "nothing is good enough")


def test_failed_requirement_is_a_refusal_with_its_reason_and_line() -> None:
    def attention(x: Tensor) -> Tensor:
        return (x @ x.T).softmax(-1) @ x

    session = drive(program_of(attention, X), Attention())

    (refusal,) = session.log.refusals
    assert refusal == Refusal(
        rule="attention",
        pass_name="test",
        kind="requirement",
        node="softmax",
        reason="the query is not square",
        user_line=f"{__file__}:{attention.__code__.co_firstlineno + 1} in attention",
        recognizes="attention",
    )
    statistics = session.log.of("attention")
    assert (statistics.tried, statistics.refused, statistics.fired) == (2, 1, 0)


def test_first_failed_requirement_is_the_reason() -> None:
    session = drive(program_of(lambda x: (x @ x).softmax(-1) @ x, numbers(3, 3)), Attention())
    assert [r.reason for r in session.log.refusals] == ["nothing is good enough"]


def test_partial_match_that_reached_the_landmark_is_a_refusal() -> None:
    session = drive(program_of(lambda x: x.relu().softmax(-1) @ x, numbers(3, 3)), Attention())
    (refusal,) = session.log.refusals
    assert (refusal.kind, refusal.node) == ("pattern", "softmax")
    assert refusal.reason == "expected aten.matmul.default, found aten.relu.default (relu)"


def test_partial_match_short_of_the_landmark_is_no_site() -> None:
    session = drive(program_of(lambda x: x.relu() @ x, numbers(3, 3)), Attention())
    assert not session.log.refusals


def test_quiet_rules_report_no_refusals() -> None:
    class Identity(ReluIsClamp):
        quiet = True

        def check(self, match: Match) -> Iterator[Requirement]:
            yield need(False, "not today")

    assert not drive(program_of(stacked, X), Identity()).log.refusals


def test_site_that_fired_in_the_end_is_not_refused() -> None:
    class Lone(Rule):
        """relu(x), where x is an input: others only once what is in front of them is gone."""

        recognizes = "relu"

        def pattern(self, x: Any) -> Any:
            return relu(x)

        def check(self, match: Match) -> Iterator[Requirement]:
            yield need(match.x.op == "placeholder", "reads no input", at=match.root)

        def replace(self, match: Match, build: Builder) -> Replacement:
            return build.call(aten.clamp.default, match.x, 0)

    class DropNegation(Rule):
        exactness = Exactness.LOSSY

        def pattern(self, x: Any) -> Any:
            return Call((aten.neg.default,), (x,))

        def replace(self, match: Match, build: Builder) -> Replacement:
            node: Any = match.x
            return node

    session = drive(program_of(lambda x: (-x).relu(), X), Lone(), DropNegation())
    assert not session.log.refusals and session.log.recognized() == {"relu": 1}


def test_rule_that_raises_while_it_checks_is_reported_and_the_others_go_on() -> None:
    class Careless(ReluIsClamp):
        def check(self, match: Match) -> Iterator[Requirement]:
            yield need(match.root.args[7] is None, "never reached")

    program = program_of(stacked, X)
    session = drive(program, Careless(), ReluIsClamp())
    assert operators(program).count("clamp") == 3
    assert session.log.of("careless").rolled_back == 3


# A rule that is wrong: whatever it does, the graph stays as it was.


class Wrong(Rule):
    """Base of rules that go wrong at relu."""

    exactness = Exactness.REASSOCIATED

    def pattern(self, x: Any) -> Any:
        return relu(x)


class Raises(Wrong):
    def replace(self, match: Match, build: Builder) -> Replacement:
        build.call(aten.tanh.default, match.x)
        raise RuntimeError("out of ideas")


class BuildsNonsense(Wrong):
    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.matmul.default, match.x, match.x)


class ChangesShape(Wrong):
    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.unsqueeze.default, build.call(aten.relu.default, match.x), 0)


class ChangesType(Wrong):
    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.to.dtype, build.call(aten.relu.default, match.x), torch.float64)


class ChangesNumbers(Wrong):
    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.abs.default, match.x)


class AddsWeights(Wrong):
    def replace(self, match: Match, build: Builder) -> Replacement:
        table = match.program.add_constant("table", torch.full((2, 3), 2.0))
        return build.call(aten.mul.Tensor, build.call(aten.relu.default, match.x), table)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Raises(), "RuntimeError: out of ideas"),
        (BuildsNonsense(), "RuntimeError"),
        (ChangesShape(), "shape changes from [2, 3] to [1, 2, 3]"),
        (ChangesType(), "element type changes from torch.float32 to torch.float64"),
        (ChangesNumbers(), "against fp64"),
        (AddsWeights(), "against fp64"),
    ],
)
def test_wrong_rewrite_is_taken_back_and_reported(rule: Rule, reason: str) -> None:
    program = program_of(stacked, X)
    before, weights = str(program.graph), program.weight_count()

    session = drive(program, rule)

    assert str(program.graph) == before
    assert program.weight_count() == weights and "table" not in program.weights
    assert [r.kind for r in session.log.refusals] == ["rolled back"] * 3
    assert all(reason in r.reason for r in session.log.refusals)
    assert session.log.of(rule.name).rolled_back == 3 and session.applied == 0
    torch.testing.assert_close(run(program, (X,)), stacked(X))


@pytest.mark.parametrize("verify", ["final", "off"])
def test_without_verification_only_shapes_are_checked(verify: str) -> None:
    program = program_of(stacked, X)
    assert drive(program, ChangesNumbers(), verify=verify).applied == 3
    assert operators(program).count("abs") == 3
    assert drive(program_of(stacked, X), ChangesShape(), verify=verify).applied == 0


def test_rewrite_of_part_of_a_match_keeps_what_others_read() -> None:
    class Shift(Rule):
        """(x + c) - c is x, up to rounding."""

        def pattern(self, x: Any) -> Any:
            return sub(add(x, scalar("c")), scalar("c"))

        def replace(self, match: Match, build: Builder) -> Replacement:
            return build.call(aten.clone.default, match.x)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        shifted = x + 1
        return shifted - 1, shifted

    program = program_of(both, X)
    drive(program, Shift())
    assert sorted(operators(program)) == ["add.Tensor", "clone"]
    torch.testing.assert_close(run(program, (X,)), both(X))
