"""Traces of every form give the same statistics and plan whether read whole or in pieces, here or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from regraft.placement.request import Request, problem_of, solve_problem
from regraft.placement.traces import stored_trace
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.readers.native import write_trace
from regraft.solvers.placement.readers.stored import observe_stored, whole_trace
from regraft.solvers.placement.statistics import Statistics, observe
from regraft.solvers.placement.workload import workload_of
from tests.regraft.placement.recordings import (
    CONFIG,
    COUNTS,
    EXPERTS,
    FORMS,
    LAYERS,
    TOP_K,
    sglang_passes,
    tensorrt_choices,
    trace,
)

MODEL = MoeModel.simple(LAYERS, EXPERTS, TOP_K)
EVERY = {**FORMS, "tensorrt-choices": tensorrt_choices, "sglang-passes": sglang_passes}


def same(first: Statistics, second: Statistics) -> bool:
    """Equal to the last bit in everything that a workload is made of."""
    pairs = zip(workload_of(first).scenarios, workload_of(second).scenarios, strict=True)
    for mine, theirs in pairs:
        for name in ("counts", "tokens", "experts", "sources", "transitions"):
            a, b = getattr(mine, name), getattr(theirs, name)
            if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
                return False
    return first.model_name == second.model_name


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("piece_bytes", [1, 1500])
def test_pieces_sum_to_what_is_read_whole(form: str, piece_bytes: int, tmp_path: Path) -> None:
    EVERY[form](tmp_path / "recording")
    stored = stored_trace(tmp_path / "recording", MODEL)
    whole = whole_trace(stored)
    assert len(whole.batches) == len(stored.scenarios) and whole.num_layers == stored.num_layers
    with ThreadPoolExecutor(2) as executor:
        for workers in (None, executor):
            assert same(observe_stored(stored, executor=workers, piece_bytes=piece_bytes), observe(whole))


def test_transitions_that_a_file_holds_itself_come_with_pieces(tmp_path: Path) -> None:
    batches = [replace(b, experts=None, scenario="ab"[n // 2]) for n, b in enumerate(trace().batches)]
    given = {"b": np.full((1, EXPERTS, EXPERTS), 2.0)}
    write_trace(replace(trace(), batches=tuple(batches), transitions=given), tmp_path / "t.npz")
    stored = stored_trace(tmp_path / "t.npz")
    found = observe_stored(stored, piece_bytes=1)
    assert same(found, observe(whole_trace(stored)))
    assert found.routing["b", "prefill"].transitions is not None and found.routing["a", "prefill"].transitions is None


@pytest.mark.parametrize("form", ["npz", "sglang-passes", "torch"])
@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_a_trace_in_pieces_gives_the_same_plan(form: str, holdout: float, tmp_path: Path) -> None:
    EVERY[form](tmp_path / "recording")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "c.toml").write_text("nodes = 2\ngpus_per_node = 2\n")
    request = Request(
        tmp_path / "recording", str(tmp_path / "c.toml"), tmp_path / "config.json", holdout=holdout, time_limit=0.0
    )

    def planned(piece_bytes: int) -> tuple[Plan, float]:
        problem = problem_of(replace(request, piece_bytes=piece_bytes))
        auto = solve_problem(problem).auto
        return auto.plan, auto.scored.objective

    (one, score), (other, other_score) = planned(1), planned(1 << 30)
    assert (one.array == other.array).all() and score == other_score


def test_layers_of_sglang_are_found_over_all_steps(tmp_path: Path) -> None:
    """A layer with tokens in one step alone counts; one without any is dense."""
    count = torch.zeros(3, 4, EXPERTS, dtype=torch.int32)
    count[0, 1], count[2, 3] = 5, 7
    torch.save({"logical_count": count}, tmp_path / "r.pt")
    stored = stored_trace(tmp_path / "r.pt", top_k=TOP_K)
    assert whole_trace(stored).layer_ids == (1, 3) and len(stored.scenarios) == 2
    torch.save({"logical_count": 0 * count}, tmp_path / "zero.pt")
    with pytest.raises(PlacementError, match="holds zeros"):
        stored_trace(tmp_path / "zero.pt", top_k=TOP_K)


def unequal(path: Path) -> None:
    slots = [list(range(EXPERTS))] * LAYERS
    fewer = [[*range(EXPERTS - 1), 0]] * LAYERS
    lines = [
        {"record_type": "eplb_load_stats", "expert_load": COUNTS.tolist(), "p2l_map": table} for table in (slots, fewer)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))


def late_nan(path: Path) -> None:
    count = torch.ones(3, LAYERS, EXPERTS)
    count[2, 1, 1] = torch.nan
    torch.save({"logical_count": count}, path)


@pytest.mark.parametrize(
    ("make", "said"), [(unequal, "line 2 places 7 experts and the first one 8"), (late_nan, "not finite")]
)
def test_what_is_wrong_in_a_later_piece_is_said(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "recording")
    with pytest.raises(PlacementError, match=said):
        observe_stored(stored_trace(tmp_path / "recording", MODEL), piece_bytes=1)
