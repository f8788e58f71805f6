"""Attention sharded by heads or by keys: what each rank computes merges into the whole, on real ranks too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.ops.gather import collective_calls
from regraft.ir.program import Program
from regraft.ir.transport import GroupError
from regraft.ir.verify import relative_l2
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.shard import ShardAttention
from tests.ir.graphs import numbers
from tests.ranks import torchrun
from tests.support import captured, run

Q, K, V = numbers(2, 4, 9, 8, seed=1), numbers(2, 2, 9, 8, seed=2), numbers(2, 2, 9, 6, seed=3)
TREE = torch.tensor([[[1], [2], [5], [9], [11], [32], [1], [2], [3]]])
KEPT = torch.tensor([[1] * 9, [0, 0, 0, 0, 0, 0, 1, 1, 0]])

#: The operands after query, key and value, and the options, of an attention.
SITES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "all": (([],), {}),
    "causal": (([],), {"mask": "band(None,0)"}),
    "window and sink": (([],), {"mask": "band(-2,0) | prefix(2)"}),
    "padding, rows without a key": (([KEPT],), {"mask": "keys(0) & band(-1,0)", "empty_rows": "zero"}),
    "a number at masked scores": (([KEPT],), {"mask": "keys(0)", "mask_fill": -1e4}),
    "dense by head": (([numbers(2, 4, 9, 9) > 0],), {"mask": "dense(0) | band(0,0)"}),
    "bias, slopes, sinks": (([], numbers(1, 4, 9, 9), numbers(4), numbers(4)), {"softcap": 5.0}),
    "bias of all heads": (([], numbers(9, 9)), {"mask": "band(None,0)"}),
    "tree": (([TREE],), {"mask": "bits(0)", "empty_rows": "zero"}),
}


def site(name: str) -> Program:
    operands, options = SITES[name]
    return captured(lambda q, k, v: ops.attention(q, k, v, *operands, scale=0.4, **options), (Q, K, V))


@pytest.mark.parametrize("by", ["heads", "keys"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SITES)
def test_all_ranks_together_compute_the_whole(name: str, ranks: int, by: str) -> None:
    """Each rank's rewrite is checked with all ranks played in this process."""
    for rank in range(ranks):
        program, session = site(name), Session()
        assert ShardAttention(ranks, rank, by).run(program, session) == 1
        assert session.log.refusals == [] and session.log.applications[0].drift is not None
        (call,) = collective_calls(program.graph)
        assert (call["ranks"], call["rank"]) == (ranks, rank)


def test_a_rank_has_its_own_heads_and_keys() -> None:
    program = site("causal")
    ShardAttention(2, 1).run(program, Session())
    (local,) = (node for node in program.graph.nodes if node.target is ops.attention)
    assert arguments(local)["query"].meta["val"].shape[1] == 2 and arguments(local)["key"].meta["val"].shape[1] == 1
    program = site("causal")
    ShardAttention(2, 1, "keys").run(program, Session())
    (part,) = (node for node in program.graph.nodes if node.target is ops.attention_part)
    assert arguments(part)["first"] == 4 and arguments(part)["key"].meta["val"].shape[2] == 5


@pytest.mark.parametrize(
    ("ranks", "by", "reason"),
    [
        (3, "heads", "4 heads cannot be shared by 3 ranks evenly"),
        (16, "keys", "9 keys are fewer than 16 ranks"),
    ],
)
def test_what_cannot_be_shared_stays_whole(ranks: int, by: str, reason: str) -> None:
    program, session = site("causal"), Session()
    assert ShardAttention(ranks, 0, by).run(program, session) == 0
    assert [refusal.reason for refusal in session.log.refusals] == [reason]
    assert relative_l2(run(program, (Q, K, V)), ops.attention(Q, K, V, [], scale=0.4, mask="band(None,0)")) <= 1e-6


def test_masks_that_name_heads_are_refused_by_heads_only() -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return ops.attention(q, k, v, [], scale=0.4, mask="band(None,0) & heads(0,2) | band(-2,0)")

    program, session = captured(attend, (Q, K, V)), Session()
    assert ShardAttention(2, 0).run(program, session) == 0
    assert "differs from head to head" in session.log.refusals[0].reason
    assert ShardAttention(2, 0, "keys").run(program, session) == 1


def test_symbolic_keys_are_refused_by_keys_only() -> None:
    shapes = ({2: torch.export.Dim("length", min=2)},) * 3
    dynamic = (tuple(shapes),)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return ops.attention(q, k, v, [], scale=0.4)

    program, session = captured(attend, (Q, K, V), dynamic), Session()
    assert ShardAttention(2, 0, "keys").run(program, session) == 0
    assert "symbolic" in session.log.refusals[0].reason
    assert ShardAttention(2, 0).run(program, session) == 1


def test_one_rank_s_program_does_not_run_alone() -> None:
    program = site("causal")
    ShardAttention(2, 1).run(program, Session())
    with pytest.raises(GroupError, match="rank 1 of a model that is sharded over 2 ranks, and no process group"):
        run(program, (Q, K, V))


@pytest.mark.parametrize("given", [(0, 0, "heads"), (2, 2, "heads"), (2, 0, "rows")])
def test_ranks_that_cannot_be(given: tuple[int, int, str]) -> None:
    with pytest.raises(AttentionError, match="give"):
        ShardAttention(*given)


@pytest.mark.parametrize(("ranks", "names"), [(2, ["causal", "padding", "sinks"]), (4, ["causal", "padding", "sinks"])])
def test_real_ranks(ranks: int, names: list[str], tmp_path: Path) -> None:
    done = torchrun(ranks, Path(__file__).with_name("shard_ranks.py"), tmp_path, *names)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert len(found) == 2 * len(names)
        assert all(case["error"] <= 1e-5 and case["sharded"] == 1 for case in found.values())
