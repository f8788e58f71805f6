"""Rules and matches: names, roots, requirements, and the shapes that a match can ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir.matcher import Matcher
from regraft.ir.pattern import chain, either, matmul, maybe, mul, relu, scalar, silu, softmax, tanh, variable
from regraft.ir.rule import Match, Rule, need
from tests.ir.graphs import numbers, program_of, root_of

aten = torch.ops.aten
Q, K = numbers(2, 3, 4), numbers(2, 4, 5)


class WeightedSum(Rule):
    """softmax(x) @ y."""

    def pattern(self, x: Any, y: Any) -> Any:
        return matmul(softmax(x, -1).named("weights"), y)


def match_of(rule: Rule, function: Callable[..., Tensor], *args: Tensor) -> Match:
    program = program_of(function, *args)
    root = root_of(program)
    state = next(Matcher().match(rule.compiled, root))
    return Match(root, state, program)


def weighted(a: Tensor, b: Tensor) -> Tensor:
    return a.softmax(-1) @ b


def test_name_is_the_class_name_in_kebab_case() -> None:
    assert WeightedSum().name == "weighted-sum"


def test_parameters_of_the_pattern_are_tensor_variables() -> None:
    match = match_of(WeightedSum(), weighted, Q, K)
    assert (match.x.name, match["y"].name, match.weights.name) == ("args_0", "args_1", "softmax")
    assert "x" in match and "z" not in match and match.get("z", 1) == 1


def test_unknown_variable_is_named() -> None:
    match = match_of(WeightedSum(), weighted, Q, K)
    with pytest.raises(AttributeError, match="the pattern binds nothing named 'z'"):
        _ = match.z


def test_rule_without_pattern_says_so() -> None:
    class Empty(Rule):
        pass

    with pytest.raises(TypeError, match="rule empty has no pattern"):
        _ = Empty().compiled


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (relu(variable("x")), {aten.relu.default}),
        (either(relu(variable("x")), silu(variable("x"))), {aten.relu.default, aten.silu.default}),
        (maybe(tanh, relu(variable("x"))), {aten.tanh.default, aten.relu.default}),
        (
            chain(relu(variable("x")), "steps", scale=lambda s: mul(s, scalar("c"))),
            {aten.mul.Tensor, aten.relu.default},
        ),
    ],
)
def test_roots_are_the_operators_a_pattern_can_start_with(pattern: Any, expected: set[Any]) -> None:
    class Rooted(Rule):
        def pattern(self) -> Any:
            return pattern

    assert Rooted().root_targets == expected


def test_shape_requirement_binds_dims_by_name() -> None:
    match = match_of(WeightedSum(), weighted, Q, K)
    assert match.shape("x", "B M K").holds
    assert match.shape("y", "B K N").holds
    assert match.dims == {"B": 2, "M": 3, "K": 4, "N": 5}


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ("B K", "y does not have the 2 dimensions B K"),
        ("B M N", "y has size 4 where B M N wants M = 3"),
        ("7 K N", "y has size 2 where 7 K N wants 7 = 7"),
    ],
)
def test_shape_requirement_that_fails_says_what_differs(dims: str, reason: str) -> None:
    match = match_of(WeightedSum(), weighted, Q, K)
    assert match.shape("x", "B M K").holds
    requirement = match.shape("y", dims)
    assert not requirement.holds and requirement.reason == reason


def test_sole_user_looks_at_readers_outside_the_match() -> None:
    assert match_of(WeightedSum(), weighted, Q, K).sole_user("weights")

    def leaking(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weights = a.softmax(-1)
        return weights @ b, weights.sum()

    assert not match_of(WeightedSum(), leaking, Q, K).sole_user("weights")


def test_weight_name_tells_weights_from_activations() -> None:
    layer = torch.nn.Linear(4, 4)
    match = match_of(WeightedSum(), lambda a: a.softmax(-1) @ layer.weight, Q)
    assert match.weight_name(match.x) is None and match.weight_name(3) is None


def test_requirement_keeps_reason_and_node() -> None:
    requirement = need(False, "too wide", at="not a node")
    assert (requirement.holds, requirement.reason, requirement.node) == (False, "too wide", None)
