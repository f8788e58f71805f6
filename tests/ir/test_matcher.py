"""Matching: what binds, what does not, and what the nearest partial match says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir.driver import Driver, Session
from regraft.ir.matcher import Matcher, State
from regraft.ir.pattern import (
    Call,
    Pattern,
    add,
    anything,
    cat,
    chain,
    div,
    either,
    matmul,
    maybe,
    mul,
    permute,
    relu,
    scalar,
    softmax,
    sub,
    tanh,
    variable,
)
from regraft.ir.rule import Rule
from tests.ir.graphs import numbers, program_of, root_of

aten = torch.ops.aten
X, Y = numbers(2, 3), numbers(2, 3, seed=1)
x, y = variable("x"), variable("y")


def matched(pattern: Pattern, function: Callable[..., Tensor], *args: Tensor, dynamic: Any = None) -> State | None:
    """The first match at the output of ``function``; None when there is none."""
    return next(Matcher().match(pattern, root_of(program_of(function, *(args or (X,)), dynamic=dynamic))), None)


def names(state: State | None) -> dict[str, Any]:
    assert state is not None
    return {name: getattr(value, "name", value) for name, value in state.bindings.items()}


def miss(pattern: Pattern, function: Callable[..., Tensor], *args: Tensor) -> str:
    """Why ``pattern`` does not match, in the matcher's words."""
    matcher = Matcher()
    assert next(matcher.match(pattern, root_of(program_of(function, *(args or (X,))))), None) is None
    assert matcher.nearest is not None
    return matcher.nearest.reason


def test_call_binds_its_operands_and_consumes_its_nodes() -> None:
    state = matched(sub(relu(x).named("positive"), y), lambda a, b: a.relu() - b, X, Y)
    assert names(state) == {"positive": "relu", "x": "args_0", "y": "args_1"}
    assert state is not None and [node.name for node in state.nodes] == ["sub", "relu"]


@pytest.mark.parametrize("function", [lambda a, b: a.relu() + b, lambda a, b: b + a.relu()])
def test_commutative_operands_match_in_either_order(function: Callable[..., Tensor]) -> None:
    assert names(matched(add(relu(x), y), function, X, Y)) == {"x": "args_0", "y": "args_1"}


def test_other_operands_keep_their_order() -> None:
    assert matched(sub(relu(x), y), lambda a, b: b - a.relu(), X, Y) is None


def test_every_order_is_offered() -> None:
    root = root_of(program_of(lambda a, b: a + b, X, Y))
    assert [names(state) for state in Matcher().match(add(x, y), root)] == [
        {"x": "args_0", "y": "args_1"},
        {"x": "args_1", "y": "args_0"},
    ]


def test_backtracking_reaches_past_a_first_alternative_that_leads_nowhere() -> None:
    pattern = add(mul(x, 2), x)
    assert matched(pattern, lambda a: a + a * 2) is not None
    assert matched(add(mul(x, y), x), lambda a, b: b * a + a, X, Y) is not None


def test_variable_named_twice_binds_one_node() -> None:
    assert matched(sub(x, relu(x)), lambda a: a - a.relu()) is not None
    assert matched(sub(x, relu(x)), lambda a, b: a - b.relu(), X, Y) is None


def test_anything_named_twice_binds_equal_values() -> None:
    turn = permute(permute(x, anything("dims")), anything("dims"))
    assert matched(turn, lambda a: a.permute(1, 0).permute(1, 0)) is not None
    assert matched(turn, lambda a: a.permute(1, 0).permute(0, 1)) is None


def test_literals_compare_by_value() -> None:
    assert matched(mul(x, 2), lambda a: a * 2.0) is not None
    assert matched(mul(x, 2), lambda a: a * 3) is None
    assert matched(permute(x, [1, 0]), lambda a: a.permute(1, 0)) is not None
    assert matched(permute(x, [0, 1]), lambda a: a.permute(1, 0)) is None


def test_true_is_not_one() -> None:
    keep = Call((aten.mean.dim,), (x, [-1], 1))
    assert matched(keep, lambda a: a.mean([-1], True)) is None
    assert matched(Call((aten.mean.dim,), (x, [-1], True)), lambda a: a.mean([-1], True)) is not None


def test_argument_left_out_must_have_its_default() -> None:
    assert matched(add(x, y), lambda a, b: torch.add(a, b, alpha=1), X, Y) is not None
    assert matched(add(x, y), lambda a, b: torch.add(a, b, alpha=2), X, Y) is None
    assert matched(softmax(x, -1), lambda a: a.softmax(-1, torch.float64)) is None


def test_argument_given_by_keyword_matches_a_place() -> None:
    assert names(matched(add(x, y, alpha=scalar("alpha")), lambda a, b: torch.add(a, b, alpha=3), X, Y)) == {
        "x": "args_0",
        "y": "args_1",
        "alpha": 3,
    }


def test_loose_call_ignores_arguments_that_it_does_not_mention() -> None:
    assert matched(Call((aten.softmax.int,), (x,), loose=True), lambda a: a.softmax(0, torch.float64)) is not None


def test_scalar_binds_numbers_and_no_tensors() -> None:
    assert names(matched(mul(x, scalar("factor")), lambda a: a * 0.5))["factor"] == 0.5
    assert matched(mul(x, scalar("factor")), lambda a, b: a * b, X, Y) is None


def test_tensor_variable_binds_no_number() -> None:
    assert matched(mul(x, y), lambda a: a * 0.5) is None


def test_list_of_tensors_matches_item_by_item() -> None:
    assert names(matched(cat([x, relu(y)], -1), lambda a, b: torch.cat([a, b.relu()], -1), X, Y)) == {
        "x": "args_0",
        "y": "args_1",
    }
    assert matched(cat([x], -1), lambda a: torch.cat([a, a], -1)) is None


def test_tag_tells_which_alternative_was_taken() -> None:
    pattern = either(halved=mul(x, 0.5), divided=div(x, 2), tag="form")
    assert names(matched(pattern, lambda a: a / 2))["form"] == "divided"
    assert names(matched(pattern, lambda a: a * 0.5))["form"] == "halved"


def test_maybe_takes_the_wrapper_where_it_is_there() -> None:
    pattern = tanh(maybe(relu, x, tag="form"))
    assert names(matched(pattern, lambda a: a.relu().tanh())) == {"form": "wrapped", "x": "args_0"}
    assert names(matched(pattern, lambda a: a.tanh())) == {"form": "bare", "x": "args_0"}


STEPS = chain(
    matmul(x, y),
    "steps",
    scale=lambda s: mul(s, scalar("factor")),
    shift=lambda s: add(s, variable("addend")),
)


@pytest.mark.parametrize(
    ("function", "labels"),
    [
        (lambda a, b: a @ b, []),
        (lambda a, b: (a @ b) * 2, ["scale"]),
        (lambda a, b: (a @ b) * 2 + a, ["scale", "shift"]),
        (lambda a, b: (a + (a @ b)) * 2 * 3, ["shift", "scale", "scale"]),
    ],
)
def test_chain_takes_steps_in_any_order_innermost_first(function: Callable[..., Tensor], labels: list[str]) -> None:
    state = matched(STEPS, function, numbers(3, 3), numbers(3, 3, seed=1))
    assert state is not None
    assert [step.label for step in state.bindings["steps"]] == labels


def test_chain_steps_have_bindings_of_their_own() -> None:
    state = matched(STEPS, lambda a, b: (a @ b) * 2 * 3, numbers(3, 3), numbers(3, 3))
    assert state is not None
    first, second = state.bindings["steps"]
    assert (first["factor"], second["factor"]) == (2, 3)
    assert "factor" not in state.bindings
    assert second.node in state.nodes and first.node in state.nodes


def test_symbolic_sizes_bind_as_scalars() -> None:
    sizes = (({0: torch.export.Dim("batch", min=2, max=64)},),)
    state = matched(mul(x, scalar("size")), lambda a: a * a.shape[0], X, dynamic=sizes)
    assert state is not None
    assert isinstance(state.bindings["size"].meta["val"], torch.SymInt)


def test_nearest_miss_names_what_was_expected_and_found() -> None:
    reason = miss(matmul(softmax(x, -1), y), lambda a, b: a.relu() @ b, numbers(3, 3), numbers(3, 3))
    assert reason == "expected aten.softmax.int, found aten.relu.default (relu)"


def test_nearest_miss_is_the_furthest_one() -> None:
    pattern = either(relu(x), tanh(softmax(x, -1)))
    assert miss(pattern, lambda a: a.sigmoid().tanh()) == (
        "expected aten.softmax.int, found aten.sigmoid.default (sigmoid)"
    )


def test_nearest_miss_of_a_default_names_the_argument() -> None:
    assert "with the default alpha" in miss(add(x, y), lambda a, b: torch.add(a, b, alpha=2), X, Y)


def test_nearest_miss_of_a_literal_names_the_literal() -> None:
    assert miss(softmax(x, -1), lambda a: a.softmax(0)).startswith("expected -1, found")


class Never(Rule):
    """A pattern that gets some way at every relu, and fires nowhere."""

    def pattern(self, x: Any) -> Any:
        return relu(tanh(relu(tanh(sub(x, 3)))))


def attempts(layers: int) -> int:
    def stacked(a: Tensor) -> Tensor:
        for _ in range(layers):
            a = a.tanh().relu()
        return a

    session = Session()
    Driver(program_of(stacked, X), (Never(),), session, "test").run()
    return session.log.of("never").tried


def test_attempts_grow_with_the_number_of_nodes() -> None:
    assert (attempts(3), attempts(30)) == (3, 30)


def test_work_of_one_attempt_does_not_depend_on_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    solve = Matcher._solve

    def counted(self: Matcher, pattern: Any, value: Any, state: State) -> Any:
        nonlocal calls
        calls += 1
        return solve(self, pattern, value, state)

    monkeypatch.setattr(Matcher, "_solve", counted)
    spent = []
    for layers in (10, 100):
        calls = 0
        attempts(layers)
        spent.append(calls)
    assert spent[1] <= 11 * spent[0]
