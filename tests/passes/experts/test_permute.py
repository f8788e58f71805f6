"""Experts permuted in the graph: the model computes what it did; what would not be exact is refused and left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.ops.moe import moe
from regraft.ir.program import Program
from regraft.passes.experts.errors import PermutationError
from regraft.passes.experts.permutation import Permutation, permutations_of
from regraft.passes.experts.permute import PermuteExperts
from regraft.solvers.placement.plan import Plan
from tests.passes.experts.models import (
    FAMILIES,
    IDS,
    HandWritten,
    Logits,
    permutations,
    random_order,
    random_plan,
    recognised,
    relative,
    tiny,
)
from tests.support import run

X = torch.randn(7, 10, generator=torch.Generator().manual_seed(5))


def weights(program: Program, name: str) -> list[Tensor]:
    """An argument of every site, as a tensor."""
    held = [arguments(node)[name] for node in program.graph.nodes if node.target is moe]
    return [program.weights.get(str(program.weight_name(node))) for node in held]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_computes_the_same_with_its_experts_elsewhere(kind: str, seed: int) -> None:
    program = recognised(Logits(tiny(kind)), (IDS,))
    before, first = run(program, (IDS,)), weights(program, "first")
    plan = random_plan(kind, seed)
    session = Session()
    assert PermuteExperts.of_plan(plan).run(program, session) == len(first), session.log.refusals
    assert relative(run(program, (IDS,)), before) <= 1e-6
    for order, old, new in zip(permutations(plan), first, weights(program, "first"), strict=True):
        assert torch.equal(new, old[list(order.order)])


def test_the_old_router_is_gone() -> None:
    program = recognised(Logits(tiny("deepseek_v3")), (IDS,))
    program.drop_unused_weights()
    size = len(program.graph.nodes)
    PermuteExperts.of_plan(random_plan("deepseek_v3", 0)).run(program, Session())
    assert len(program.graph.nodes) == size


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_that_crosses_router_groups_is_refused(seed: int) -> None:
    program = recognised(Logits(tiny("deepseek_v3")), (IDS,))
    before, code = run(program, (IDS,)), str(program.graph)
    session = Session()
    assert PermuteExperts.of_plan(random_plan("deepseek_v3", seed, groups=1)).run(program, session) == 0
    assert session.log.refusals and all("crosses router groups" in found.reason for found in session.log.refusals)
    assert "modeling_deepseek_v3.py" in session.log.refusals[0].user_line
    assert str(program.graph) == code and torch.equal(run(program, (IDS,)), before)


def test_one_group_limits_nothing() -> None:
    program = recognised(Logits(tiny("deepseek_v3", n_group=1, topk_group=1)), (IDS,))
    before = run(program, (IDS,))
    assert PermuteExperts.of_plan(random_plan("deepseek_v3", 4, groups=1)).run(program, Session()) == 2
    assert relative(run(program, (IDS,)), before) <= 1e-6


@pytest.mark.parametrize("size", [(6, 10, 12, 3), (5, 10, 4, 1), (16, 10, 8, 4)])
def test_bias_temperature_correction_and_scale_move_with_the_experts(size: tuple[int, int, int, int]) -> None:
    program = recognised(HandWritten(*size), (X,))
    before = run(program, (X,))
    order = Permutation(random_order(size[0], 11))
    session = Session()
    assert PermuteExperts((order,)).run(program, session) == 1, session.log.refusals
    assert relative(run(program, (X,)), before) <= 1e-6
    derived = {part for op in program.weights.derived.values() for part in op.inputs}
    assert {"rows", "bias", "temperature", "correction", "scale", "first", "down"} <= derived
    assert session.log.applications[0].drift is not None and session.log.applications[0].drift <= 1e-6


def test_a_symbolic_number_of_tokens() -> None:
    model = HandWritten()
    program = recognised(model, (X,), dynamic=True)
    assert PermuteExperts((Permutation(random_order(6, 8)),)).run(program, Session()) == 1
    with torch.no_grad():
        assert relative(run(program, (X[:4],)), model(X[:4])) <= 1e-6


def test_two_permutations_compose() -> None:
    program = recognised(HandWritten(), (X,))
    before, first = run(program, (X,)), weights(program, "first")[0]
    one, other = random_order(6, 1), random_order(6, 2)
    for order in (one, other):
        assert PermuteExperts((Permutation(order),)).run(program, Session()) == 1
    assert relative(run(program, (X,)), before) <= 1e-6
    assert torch.equal(weights(program, "first")[0], first[list(one)][list(other)])


def test_scores_that_are_returned_too_stay_in_the_order_of_the_model() -> None:
    class WithScores(HandWritten):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.scores(x)

    program = recognised(WithScores(), (X,))
    before = run(program, (X,))
    assert PermuteExperts((Permutation(random_order(6, 3)),)).run(program, Session()) == 1
    for new, old in zip(run(program, (X,)), before, strict=True):
        assert relative(new, old) <= 1e-6


def test_the_identity_changes_nothing() -> None:
    program = recognised(HandWritten(), (X,))
    code = str(program.graph)
    assert PermuteExperts((Permutation(tuple(range(6))),)).run(program, Session()) == 0
    assert str(program.graph) == code


def choosing(choose: Callable[[HandWritten, Tensor], Tensor]) -> nn.Module:
    """The block with another choice of experts."""

    class Choosing(HandWritten):
        def choose(self, scores: Tensor) -> Tensor:
            return choose(self, scores)

    return Choosing()


REFUSED: dict[str, tuple[Callable[[HandWritten, Tensor], Tensor], str]] = {
    "order matters": (lambda block, scores: scores.cumsum(-1).topk(3).indices, "not understood"),
    "some by their place": (lambda block, scores: scores[:, :4].topk(3).indices, "by their place"),
    "a bonus by number": (lambda block, scores: (scores + torch.arange(6)).topk(3).indices, "computed at run time"),
    "shifted numbers": (lambda block, scores: (scores.topk(3).indices + 1) % 6, "numbers of experts"),
    "fixed experts": (lambda block, scores: torch.arange(3).expand(scores.shape[0], 3), "no product of the router"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_router_that_is_not_understood_is_refused(name: str) -> None:
    choose, reason = REFUSED[name]
    program = recognised(choosing(choose), (X,))
    before, code = run(program, (X,)), str(program.graph)
    session = Session()
    assert PermuteExperts((Permutation(random_order(6, 9)),)).run(program, session) == 0
    (refusal,) = session.log.refusals
    assert reason in refusal.reason
    assert __file__ in refusal.user_line or "models.py" in refusal.user_line
    assert str(program.graph) == code and torch.equal(run(program, (X,)), before)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (((1, 0, 2, 3, 4),), "a permutation of 5 experts"),
        ((random_order(6, 0),) * 2, "permutations for 2 layers"),
        ((), "permutations for 0 layers"),
    ],
)
def test_permutations_of_another_model(orders: tuple[tuple[int, ...], ...], message: str) -> None:
    program = recognised(HandWritten(), (X,))
    with pytest.raises(PermutationError, match=message):
        PermuteExperts(tuple(Permutation(order) for order in orders)).run(program, Session())


@pytest.mark.parametrize("order", [(), (0, 0), (1, 2), (0, 1, 3)])
def test_an_order_must_name_every_expert_once(order: tuple[int, ...]) -> None:
    with pytest.raises(PermutationError, match="expected a permutation"):
        Permutation(order)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[0, 1, 2, 3, 0, 1]], "2 copies of expert 0 in layer 5"),
        ([[0, 1, 2, -1]], "no slot for expert 3 in layer 5"),
        ([[0, 1, 2, 3, -1, -1]], "leaves 2 slots of layer 5 empty"),
    ],
)
def test_plans_that_are_no_permutation(slots: list[list[int]], message: str) -> None:
    import numpy as np

    plan = Plan.of_array(np.array(slots), 4, 2, [5])
    with pytest.raises(PermutationError, match=message):
        permutations_of(plan)


def test_blocks_of_a_permutation() -> None:
    order = Permutation((5, 4, 0, 1, 2, 3))
    assert order.of_blocks(3).order == (2, 0, 1)
    assert order.of_blocks(1).order == (0,) and order.of_blocks(6).order == order.order
    assert [order.order[slot] for slot in order.inverse] == list(range(6))
    with pytest.raises(PermutationError, match="hold experts of the groups 0, 1 of 2"):
        order.of_blocks(2)
    with pytest.raises(PermutationError, match="do not divide"):
        order.of_blocks(4)
