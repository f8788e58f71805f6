"""The solver beside the baselines, and the form of a trace told by its content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.placement import run_case
from bench.placement_cases import CASES, Case, MissingData
from regraft.solvers.placement.auto.layer import Effort
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.solve import solve
from regraft.solvers.placement.baselines.simple import contiguous
from regraft.solvers.placement.compare import compare
from regraft.solvers.placement.constraints import Constraints, violations
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.readers.kinds import kind_of
from regraft.solvers.placement.slots import uniform_slots
from regraft.solvers.placement.synthetic import planted_trace
from tests.solvers.placement.cases import TWO_BY_TWO, objective_of, planted

QUICK = Options(time_limit=4.0, effort=Effort(steps=20, rounds=0, programs=0, swaps=50))


def small(communication: str = "dispatch") -> Objective:
    """Two layers of eight experts for four ranks."""
    trace = planted_trace(2, 8, 2, groups=2, parts=2, batches=2, tokens=64).trace
    return objective_of(trace, TWO_BY_TWO, communication)


@pytest.mark.parametrize("communication", ["dispatch", "per-expert", "resident"])
def test_auto_is_never_worse_than_moetuner_or_any_other(communication: str) -> None:
    objective = small(communication)
    found = compare(objective, uniform_slots(objective.model, TWO_BY_TWO), options=QUICK)
    assert {row.method for row in found.rows} >= {"auto", "contiguous", "round-robin", "eplb", "random", "moetuner"}
    assert found.auto is found.rows[0] and found.auto.method == "auto" and not found.auto.broken
    assert not found.better_than_auto()
    assert "moetuner" in found.solution.baselines
    json.dumps([row.figures() for row in found.rows], allow_nan=False)


def test_a_plan_that_is_given_is_started_from() -> None:
    """With no time left the best start is the result."""
    hidden = planted()
    objective = objective_of(hidden.trace, TWO_BY_TWO)
    best = hidden.plan(4)
    slots = uniform_slots(objective.model, TWO_BY_TWO)
    found = solve(objective, slots, options=Options(time_limit=0.0), starts={"mine": best})
    assert found.value <= objective.value(best) * (1 + 1e-9) and "mine" in found.baselines
    with pytest.raises(PlacementError, match="plan 'mine' has 8 slots per rank and was given to start from"):
        solve(objective, slots + 1, options=Options(time_limit=0.0), starts={"mine": best})


def test_without_time_or_fit_a_baseline_is_skipped_with_a_reason() -> None:
    objective = small()
    slots = uniform_slots(objective.model, TWO_BY_TWO, 4)
    found = compare(objective, slots, options=Options(time_limit=0.0))
    assert "left no time" in found.skipped["moetuner"]
    assert "no redundant slots" in compare(objective, slots, options=QUICK).skipped["moetuner"]


def test_experts_that_stay_keep_their_slots() -> None:
    objective = small()
    slots = uniform_slots(objective.model, TWO_BY_TWO)
    current = contiguous(objective.model, TWO_BY_TWO, slots)
    found = compare(objective, slots, Constraints(current=current), QUICK)
    moved = found.auto.planned.migration
    assert moved is not None and found.row("current") is not None
    changed = sum(int((new != old).sum()) for new, old in zip(found.auto.plan.slots, current.slots, strict=True))
    assert changed == moved.experts
    assert not violations(found.auto.plan, objective.model, TWO_BY_TWO)


def test_a_bench_case_records_every_method_and_target() -> None:
    hidden = planted_trace(2, 16, 2, groups=2, parts=2, batches=4, tokens=128)
    first, second = hidden.trace.split(0.5)
    objective = objective_of(first, TWO_BY_TWO)
    held_out = objective.with_workload(objective_of(second, TWO_BY_TWO).workload)
    case = Case("small", objective, held_out, optimum=hidden.plan(4), fewer_copies=True)
    record, compared = run_case(case, 2.0, None)
    json.dumps(record, allow_nan=False)
    assert len(record["targets"]) == 5 and record["targets"][0]["met"]
    assert [row["method"] for row in record["methods"]] == [row.method for row in compared.rows]
    assert record["peak_bytes"] > 0


def test_recorded_counts_that_are_missing_are_said(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="REGRAFT_MOE_DATA"):
        CASES["olmoe-cross"](tmp_path)


def test_the_form_of_a_trace_is_told_by_its_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "a", x=np.zeros(1))
    (tmp_path / "a.npz").rename(tmp_path / "anything.json")
    assert kind_of(tmp_path / "anything.json") == "npz"
    (tmp_path / "b").write_text('{"record_type": "eplb_load_meta"}\n{}')
    assert kind_of(tmp_path / "b") == "vllm"
    (tmp_path / "c").write_text('{\n "expert_counts": {}}')
    assert kind_of(tmp_path / "c") == "counts"
    (tmp_path / "d").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(PlacementError, match="cut off or damaged"):
        kind_of(tmp_path / "d")
