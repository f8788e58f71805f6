"""The pattern language builds plain data: calls, variables, alternatives and chains."""

from __future__ import annotations

import torch

from regraft.ir.pattern import (
    Call,
    Chain,
    Either,
    Hole,
    add,
    anything,
    chain,
    either,
    maybe,
    mul,
    operator,
    scalar,
    softmax,
    variable,
)

aten = torch.ops.aten


def test_operator_call_is_a_call_pattern() -> None:
    x = variable("x")
    pattern = softmax(x, -1, dtype=None)
    assert isinstance(pattern, Call)
    assert pattern.targets == (aten.softmax.int,)
    assert pattern.arguments == (x, -1) and pattern.keywords == (("dtype", None),)


def test_addition_and_multiplication_commute() -> None:
    x, y = variable("x"), variable("y")
    assert add(x, y).commutative and mul(x, y).commutative and not softmax(x, -1).commutative


def test_naming_makes_a_new_pattern() -> None:
    bare = softmax(variable("x"), -1)
    assert bare.named("weights").name == "weights" and bare.name is None


def test_variables_say_what_they_bind() -> None:
    assert [v.kind for v in (variable("a"), scalar("b"), anything("c"))] == ["tensor", "scalar", "anything"]


def test_alternatives_are_labelled_by_place_or_keyword() -> None:
    x = variable("x")
    pattern = either(x, squared=mul(x, x), tag="form")
    assert isinstance(pattern, Either) and pattern.tag == "form"
    assert [label for label, _ in pattern.alternatives] == ["0", "squared"]


def test_maybe_prefers_the_wrapper() -> None:
    x = variable("x")
    pattern = maybe(lambda inner: mul(inner, 2), x)
    assert [label for label, _ in pattern.alternatives] == ["wrapped", "bare"]
    assert pattern.alternatives[1][1] is x


def test_chain_steps_wrap_a_hole() -> None:
    pattern = chain(variable("x"), "steps", scale=lambda inner: mul(inner, scalar("factor")))
    assert isinstance(pattern, Chain) and pattern.name == "steps"
    (step,) = pattern.steps
    assert step.label == "scale" and isinstance(step.pattern, Call)
    assert isinstance(step.pattern.arguments[0], Hole)


def test_operator_of_your_own() -> None:
    pattern = operator(aten.relu.default, aten.silu.default)(variable("x"))
    assert pattern.targets == (aten.relu.default, aten.silu.default)
