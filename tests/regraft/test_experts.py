"""``compile(experts=…)`` in one process: permuted, or one rank's part; ranks that run together: test_sharded.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regraft
from regraft.artifact import load as read
from regraft.build import Toolchain
from regraft.errors import InputError, OptionError
from regraft.ir.ops import moe_dispatch
from regraft.ir.transport import GroupError
from regraft.passes.experts.errors import PermutationError, ShardingError
from regraft.solvers.placement.plan import Plan
from tests.passes.experts.models import HandWritten

X = torch.randn(7, 10, generator=torch.Generator().manual_seed(5))
PERMUTED = Plan.of_array(np.array([[3, 1, 5, 0, 2, 4]]), 6, 2)
REPLICATED = Plan.of_array(np.array([[3, 1, 5, 0, 0, 2, 4, 1]]), 6, 2)


def rules(fast: regraft.CompiledModule) -> list[str]:
    """The rules that fired on experts."""
    return [item.rule for item in fast.report.log.applications if item.pass_name.endswith("-experts")]


@pytest.mark.parametrize("as_file", [False, True])
def test_one_process_permutes(as_file: bool, tmp_path: Path) -> None:
    PERMUTED.save(tmp_path / "plan.json")
    model = HandWritten().eval()
    fast = regraft.compile(model, (X,), experts=tmp_path / "plan.json" if as_file else PERMUTED)
    assert rules(fast) == ["permute-site"]
    torch.testing.assert_close(fast(X), model(X))


def test_the_default_places_nothing() -> None:
    assert rules(regraft.compile(HandWritten().eval(), (X,))) == []


def test_what_cannot_be_permuted_runs_as_it_was_and_says_so() -> None:
    class Numbered(HandWritten):
        """The number of the expert counts, so its place does."""

        def choose(self, scores: Tensor) -> Tensor:
            return torch.topk(scores + torch.arange(6.0).cumsum(0), self.top_k, dim=-1).indices

    model = Numbered().eval()
    fast = regraft.compile(model, (X,), experts=PERMUTED)
    assert [(event.kind, "stay:" in event.reason) for event in fast.report.events] == [("placement", True)]
    torch.testing.assert_close(fast(X), model(X))


def test_replicas_need_a_process_group() -> None:
    with pytest.raises(OptionError, match=r"2 copies of expert 0.* torchrun --nproc-per-node 2 .*init_process_group"):
        regraft.compile(HandWritten().eval(), (X,), experts=REPLICATED)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (1, "experts is a int; give a Plan, the path of a plan file, or a Sharding"),
        ("none.json", "plan file 'none.json' cannot be read"),
        (Plan.of_array(np.array([[0, 1]]), 3, 2), "no slot for expert 2"),
    ],
)
def test_what_is_no_plan_gets_a_sentence(experts: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        regraft.compile(HandWritten().eval(), (X,), experts=experts)


def test_a_plan_of_another_model_is_refused() -> None:
    other = Plan.of_array(np.array([[1, 0, 3, 2]]), 4, 2)
    with pytest.raises(PermutationError, match=r"a permutation of 4 experts .* has 6"):
        regraft.compile(HandWritten().eval(), (X,), experts=other)
    with pytest.raises(ShardingError, match=r"a plan of 4 experts .* has 6"):
        regraft.compile(HandWritten().eval(), (X,), experts=regraft.Sharding(other, rank=0))


def test_a_toolchain_of_one_s_own_takes_no_plan() -> None:
    with pytest.raises(OptionError, match="a toolchain brings its own passes"):
        regraft.compile(HandWritten().eval(), (X,), experts=PERMUTED, toolchain=Toolchain())


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_rank_s_part_is_made_checked_and_saved_by_one_process(dynamic: bool | None, tmp_path: Path) -> None:
    part = regraft.Sharding(REPLICATED, rank=1)
    fast = regraft.compile(HandWritten().eval(), (X,), experts=part, dynamic=dynamic)
    assert rules(fast) == ["shard-site"]
    assert fast.report.log.applications[-1].drift is not None
    assert fast.report.end_to_end_drift is None  # that takes the other ranks
    fast.save(tmp_path / "1.regraft")
    loaded = read(tmp_path / "1.regraft")
    assert Plan.from_json(loaded.members["plan.json"].decode()).to_json() == REPLICATED.to_json()
    (sent,) = (node.kwargs for node in loaded.program.graph.nodes if node.target is moe_dispatch)
    assert (sent["rank"], sent["ranks"], sent["group"]) == (1, 2, "world")
    named = " ".join(row.operator for row in fast.report.operators_after)
    assert "moe_dispatch" in named and "moe_combine" in named


def test_the_part_does_not_run_alone_and_the_original_does_not_stand_in() -> None:
    fast = regraft.compile(HandWritten().eval(), (X,), experts=regraft.Sharding(REPLICATED, rank=1))
    with pytest.raises(GroupError, match="rank 1 of a model that is sharded over 2 ranks, and no process group"):
        fast(X)
    with torch.autocast("cpu"), pytest.raises(InputError, match=r"autocast .* cannot run the model by itself"):
        fast(X)
