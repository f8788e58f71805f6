"""Experts sharded in the graph, checked with all ranks played in one process. Real ranks run in
tests/regraft/test_sharded.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.ops import moe, moe_combine, moe_dispatch
from regraft.ir.program import Program
from regraft.ir.transport import GroupError
from regraft.passes.experts.errors import ShardingError
from regraft.passes.experts.shard import ShardExperts
from regraft.passes.experts.sharding import Sharding
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.plan import Plan
from tests.passes.experts.models import IDS, HandWritten, Logits, recognised, tiny
from tests.support import run

X = torch.randn(7, 10, generator=torch.Generator().manual_seed(5))


def plan_of(*layers: list[list[int]], experts: int = 6) -> Plan:
    """One table ``[ranks, slots]`` a layer."""
    return Plan(experts, tuple(range(len(layers))), len(layers), tuple(map(np.array, layers)))


#: Expert 1 twice, one empty slot; rank 2 has a slot less.
PLAN = plan_of([[0, 1, 2], [3, -1, 1], [4, 5, 0]])


def shard(program: Program, sharding: Sharding, rank: int = 1, verify: str = "each") -> Session:
    """The session of sharding a recognised program."""
    session = Session(verify=verify)
    ShardExperts(sharding, rank).run(program, session)
    return session


def calls(program: Program, target: Any) -> list[dict[str, Any]]:
    """The arguments of every call of an operator."""
    return [arguments(node) for node in program.graph.nodes if node.target is target]


@pytest.mark.parametrize("split", ["even", "nearest"])
@pytest.mark.parametrize("communication", ["dispatch", "per-expert"])
def test_a_site_becomes_dispatch_own_experts_and_combine(split: str, communication: str) -> None:
    model = HandWritten()
    program = recognised(model, (X,))
    session = shard(program, Sharding(PLAN, split, communication))
    (sent,), (local,), (back,) = (calls(program, target) for target in (moe_dispatch, moe, moe_combine))
    assert (sent["ranks"], sent["slots"], sent["rank"], sent["group"]) == (3, 3, 1, "world")
    assert sent["per_choice"] == (communication == "per-expert")
    assert (back["group"], back["rank"]) == ("world", 1)
    first = program.weights.get(str(program.weight_name(local["first"])))
    assert torch.equal(first, model.first[[3, 1]])
    (application,) = session.log.applications
    assert application.drift is not None and application.drift < 1e-6
    assert not session.log.refusals


def test_only_its_own_experts_stay_in_a_rank_s_program() -> None:
    model = HandWritten()
    program = recognised(model, (X,))
    whole = program.weights.nbytes()
    shard(program, Sharding(PLAN))
    expert = (model.first[0].numel() + model.down[0].numel()) * 4
    table = 6 * 2 * 8  # copies of each expert, int64
    assert program.weights.nbytes() == whole - 4 * expert + table
    assert not program.weights.derived


def test_every_layer_of_a_model_by_its_own_table() -> None:
    program = recognised(Logits(tiny("olmoe")), (IDS,))
    plan = Plan.of_array(np.array([[3, 0, 1, 2, 7, 5, 4, 6, 3, -1], [0, 1, 2, 3, 4, 4, 5, 6, 7, 0]]), 8, 2)
    session = shard(program, Sharding(plan), rank=0)
    assert [item.drift is not None and item.drift < 1e-6 for item in session.log.applications] == [True, True]
    assert sorted(sent["layer"] for sent in calls(program, moe_dispatch)) == [0, 1]


def test_a_number_of_tokens_may_be_symbolic() -> None:
    program = recognised(HandWritten(), (X,), dynamic=({0: torch.export.Dim("tokens", min=2)},))
    session = shard(program, Sharding(PLAN))
    assert len(session.log.applications) == 1
    (back,) = calls(program, moe_combine)
    assert isinstance(back["tokens"], torch.fx.Node)


def test_a_rank_may_hold_no_expert_at_all() -> None:
    program = recognised(HandWritten(), (X,))
    session = shard(program, Sharding(plan_of([[0, 1, 2, 3, 4, 5], [-1] * 6])))
    assert len(session.log.applications) == 1
    (local,) = calls(program, moe)
    assert local["first"].meta["val"].shape[0] == 0


@pytest.mark.parametrize("verify", ["each", "final"])
def test_a_wrong_table_is_found_and_taken_back(verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sharding.copies
    monkeypatch.setattr(Sharding, "copies", lambda self, layer, rank: np.roll(right(self, layer, rank), 1, axis=0))
    model = HandWritten()
    program = recognised(model, (X,))
    session = shard(program, Sharding(PLAN), verify=verify)
    assert not session.log.applications
    (refusal,) = session.log.refusals
    assert refusal.kind == "rolled back"
    torch.testing.assert_close(run(program, (X,)), model(X))


def test_wrong_weights_of_another_rank_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sharding.held
    monkeypatch.setattr(Sharding, "held", lambda self, layer, rank: right(self, layer, rank)[:: 1 - 2 * (rank == 2)])
    session = shard(recognised(HandWritten(), (X,)), Sharding(PLAN))
    assert [refusal.kind for refusal in session.log.refusals] == ["rolled back"]


def test_experts_that_are_computed_at_run_time_are_refused_with_their_line() -> None:
    class Scaled(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            index = self.choose(self.scores(x))
            weight = self.scores(x).gather(-1, index)
            first = self.first * x.abs().max()
            ids = index.reshape(-1)
            packed = torch.bmm(first[ids], x.repeat_interleave(self.top_k, 0).unsqueeze(-1)).squeeze(-1)
            gate, up = packed.chunk(2, dim=-1)
            out = torch.bmm(self.down[ids], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
            return (out * weight.reshape(-1, 1)).view(x.shape[0], self.top_k, x.shape[1]).sum(1)

    program = recognised(Scaled(), (X,))
    session = shard(program, Sharding(PLAN))
    (refusal,) = session.log.refusals
    assert refusal.reason == "the weights of the experts are computed at run time"
    assert "test_shard.py" in refusal.user_line
    assert not calls(program, moe_dispatch)


def test_one_rank_s_program_does_not_run_alone() -> None:
    program = recognised(HandWritten(), (X,))
    shard(program, Sharding(PLAN))
    with pytest.raises(GroupError, match="rank 1 of a model that is sharded over 3 ranks"):
        run(program, (X,))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sharding(plan_of([[0, 1, 2], [3, 4, -1]])), "no slot for expert 5 in layer 0"),
        (lambda: Sharding(PLAN, "closest"), "split 'closest' was given; expected one of even, nearest"),
        (lambda: Sharding(PLAN, communication="mail"), "communication 'mail' was given"),
        (lambda: Sharding(PLAN, cluster=Cluster.uniform(1, 2)), "a cluster of 2 ranks .* a plan of 3"),
        (lambda: Sharding(PLAN, rank=3), "rank 3 was given for a plan of 3 ranks"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(make: Callable[[], Sharding], reason: str) -> None:
    with pytest.raises(ShardingError, match=reason):
        make()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of([[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]]), "a plan of 2 expert layers .* 1 recognised"),
        (plan_of([[0, 1], [2, 3]], experts=4), "a plan of 4 experts .* has 6 in layer 0"),
    ],
)
def test_a_plan_for_another_model_is_refused(plan: Plan, reason: str) -> None:
    with pytest.raises(ShardingError, match=reason):
        shard(recognised(HandWritten(), (X,)), Sharding(plan), rank=0)


def test_nearest_keeps_a_token_on_its_rank_and_in_its_node() -> None:
    """Expert 0 on every rank, expert 1 on ranks 1 and 3; two nodes of two ranks."""
    sharding = Sharding(plan_of([[0], [1], [0], [1]], experts=2), "nearest", cluster=Cluster.uniform(2, 2))
    assert [sharding.copies(0, rank)[:, 0].tolist() for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
