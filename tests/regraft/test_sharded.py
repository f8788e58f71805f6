"""Experts sharded over four real processes compute what the model does, and send the copies that the plan predicts.

One launch of torchrun serves all tests here (``sharded_ranks.py``); every finding is a list by rank.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regraft
from regraft.cli.common import UsageFault
from regraft.cli.ranks import Rank
from regraft.ir.transport import GroupError
from regraft.ir.verify import relative_l2
from tests.passes.experts.models import HandWritten
from tests.ranks import torchrun
from tests.regraft.sharded_ranks import RANKS, RUN, replicated

pytest.importorskip("transformers")
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact of every rank, written by this one process."""
    place = tmp_path_factory.mktemp("sharded")
    for name, ranks, rank in (*((str(rank), RANKS, rank) for rank in range(RANKS)), ("of-two", 2, 0)):
        sharding = regraft.Sharding(replicated(6, (0,), ranks), rank=rank)
        regraft.compile(HandWritten().eval(), (X,), experts=sharding).save(place / f"{name}.regraft")
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank found."""
    done = torchrun(RANKS, Path(__file__).with_name("sharded_ranks.py"), folder)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def of(found: dict[str, list[dict[str, Any]]], case: str, what: str) -> list[Any]:
    """One finding, by rank."""
    return [rank[what] for rank in found[case]]


@pytest.mark.parametrize("kind", RUN)
def test_a_model_computes_the_same_sharded(kind: str, found: dict[str, list[dict[str, Any]]]) -> None:
    assert max(of(found, kind, "error")) <= 1e-5
    assert of(found, kind, "events") == [[]] * RANKS


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
def test_every_rank_knows_the_drift_of_the_worst(kind: str, found: dict[str, list[dict[str, Any]]]) -> None:
    drifts = of(found, kind, "drift")
    assert 0 < max(drifts) <= 1e-5 and len(set(drifts)) == 1


@pytest.mark.parametrize("kind", [*RUN, "low precision"])
def test_the_copies_that_cross_are_those_that_the_plan_predicts(
    kind: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    (predicted, *others) = of(found, kind, "predicted")
    assert all(other == predicted for other in others)
    crossed = of(found, kind, "crossed")
    assert [[rank[layer] for rank in crossed] for layer in range(len(predicted))] == predicted
    assert sum(map(sum, predicted[0])) > 0


@pytest.mark.parametrize("kind", RUN)
def test_counting_tells_what_the_tokens_chose(kind: str, found: dict[str, list[dict[str, Any]]]) -> None:
    assert of(found, kind, "chosen") == [True] * RANKS


def test_bf16_differs_by_the_order_of_sums_alone(found: dict[str, list[dict[str, Any]]]) -> None:
    assert max(of(found, "low precision", "error")) <= 4e-3  # half a unit in the last place of bf16
    assert set(of(found, "low precision", "dtype")) == {"torch.bfloat16"}


def test_every_rank_has_its_own_sizes_and_recaptures_by_itself(found: dict[str, list[dict[str, Any]]]) -> None:
    assert max(max(errors) for errors in of(found, "changing sizes", "errors")) <= 1e-3
    events = of(found, "changing sizes", "events")
    assert "recapture" in events[1] and not any("fallback" in rank for rank in events)


def test_groups_of_any_size_and_ranks_without_tokens(found: dict[str, list[dict[str, Any]]]) -> None:
    assert max(of(found, "operators", "error")) <= 1e-10


def test_a_rank_s_artifact_runs_as_that_rank_only(found: dict[str, list[dict[str, Any]]]) -> None:
    assert max(of(found, "artifacts", "error")) <= 1e-5
    for rank, said in enumerate(of(found, "artifacts", "another")):
        assert said.startswith("GroupError: this code is rank") and f"this process is rank {rank}" in said
    assert all("over 2 ranks, and the process group has 4" in said for said in of(found, "artifacts", "of two"))


def test_what_was_compiled_in_the_group_is_saved_and_the_original_freed(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    assert max(*of(found, "saved", "freed"), *of(found, "saved", "loaded")) <= 1e-5


def test_what_one_rank_cannot_do_none_does(found: dict[str, list[dict[str, Any]]]) -> None:
    fails = of(found, "together", "fails")
    assert fails[2].startswith("CaptureError")
    assert all(said.startswith("PeerError: rank 2 of the process group stopped") for said in fails[:2])
    assert all("ranks 0 and 3 of the process group were given different plans" in said
               for said in of(found, "together", "differs"))  # fmt: skip


def test_what_cannot_run_sharded_is_refused(found: dict[str, list[dict[str, Any]]]) -> None:
    assert all("autocast" in said and "cannot run the model by itself" in said
               for said in of(found, "together", "alone"))  # fmt: skip
    assert all("the plan is for 3 ranks, and the process group has 4" in said
               for said in of(found, "together", "size"))  # fmt: skip
    assert all("leave it out" in said for said in of(found, "together", "rank"))


@pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers loads in parallel by accelerate only")
@pytest.mark.parametrize("kind", RUN)
def test_transformers_runs_the_permuted_checkpoint_on_its_own_expert_parallelism(
    kind: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    assert max(of(found, f"transformers {kind}", "error")) <= 1e-5
    assert of(found, f"transformers {kind}", "placed") == [True] * RANKS


def test_an_artifact_of_a_rank_holds_its_own_experts_and_does_not_run_alone(folder: Path) -> None:
    fast = regraft.load(folder / "1.regraft")
    model = HandWritten()
    expert = 4 * (model.first[0].numel() + model.down[0].numel())
    held = regraft.Sharding(replicated(6, (0,), RANKS)).held(0, 1)
    size = (folder / "1.regraft").stat().st_size
    stored = fast.entries[0].program.weights
    shapes = [tuple(value.shape) for value in stored.originals.values() if value.shape[1:] == model.first.shape[1:]]
    assert shapes == [(len(held), *model.first.shape[1:])] and not stored.derived
    assert len(held) < 6 and size < 6 * expert + 100_000
    with pytest.raises(GroupError, match="no process group is initialised"):
        fast(X)


def test_the_command_line_runs_the_artifacts_of_all_ranks(folder: Path) -> None:
    save_file({"0": X}, folder / "x.safetensors")
    paths = [folder / "{rank}.regraft", "--inputs", folder / "x.safetensors", "-o", folder / "y{rank}.safetensors"]
    done = torchrun(RANKS, "-m", "regraft", "run", *paths)
    assert done.returncode == 0, done.stderr
    wanted = HandWritten().eval()(X)
    for rank in range(RANKS):
        (output,) = load_file(folder / f"y{rank}.safetensors").values()
        assert relative_l2(output, wanted) <= 1e-5


def test_ranks_need_files_of_their_own() -> None:
    with pytest.raises(UsageFault, match="without torchrun there are no ranks"):
        Rank().own(Path("{rank}.regraft"))
    with pytest.raises(UsageFault, match="4 ranks would write the one file"):
        Rank(1, 4, launched=True).own_output(Path("y.safetensors"))
