"""Every engine's file has exactly its keys and its layer numbers, and reads back as the same plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from regraft.solvers.placement.baselines.simple import random_plan
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.all import FORMATS, export, read_export
from regraft.solvers.placement.exports.kinds import plan_form
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.slots import uniform_slots
from tests.solvers.placement.cases import TWO_BY_TWO

MODEL = MoeModel(8, 2, (3, 4), 5)
PLAN = random_plan(MODEL, TWO_BY_TWO, uniform_slots(MODEL, TWO_BY_TWO, 4), 1)
SAME = Plan.of_array(np.tile(np.array([1, 0, 3, 5, 2, 4, 6, 7]), (2, 1)), 8, 4, (3, 4), 5)


@pytest.mark.parametrize("engine", FORMATS)
def test_each_form_reads_back(engine: str, tmp_path: Path) -> None:
    path, plan = tmp_path / "placement", SAME if engine == "vllm-34811" else PLAN
    if engine == "omni":
        path = tmp_path / "placement.npy"
    export(plan, engine, path)
    found = read_export(engine, path, MODEL, 4)
    assert found.layer_ids == (3, 4) and found.num_hidden_layers == 5
    for mine, theirs in zip(plan.slots, found.slots, strict=True):
        if engine in ("omni", "vllm-34811"):  # which slot of a rank is not said
            mine, theirs = np.sort(mine, axis=1), np.sort(theirs, axis=1)
        assert (mine == theirs).all()
    assert list(tmp_path.iterdir()) == [path]
    other = MoeModel(8, 2, (3, 4, 5), 6) if engine != "vllm-34811" else MoeModel(9, 2, (3, 4), 5)
    with pytest.raises(PlacementError):
        read_export(engine, path, other, 4)


@pytest.mark.parametrize("engine", [form for form in FORMATS if form != "vllm-41141"])
def test_a_form_is_told_by_its_content(engine: str, tmp_path: Path) -> None:
    export(SAME, engine, tmp_path / "file")
    assert plan_form(tmp_path / "file") == engine
    SAME.save(tmp_path / "own")
    assert plan_form(tmp_path / "own") == "regraft"
    (tmp_path / "other").write_text('{"physical": []}')
    with pytest.raises(PlacementError, match="'other' is of no known form"):
        plan_form(tmp_path / "other")


def written(engine: str, tmp_path: Path, plan: Plan = PLAN) -> str:
    export(plan, engine, tmp_path / "file")
    return (tmp_path / "file").read_text()


def test_sglang_has_one_key_and_dense_layers(tmp_path: Path) -> None:
    found = json.loads(written("sglang", tmp_path))
    assert set(found) == {"physical_to_logical_map"}
    rows = found["physical_to_logical_map"]
    assert len(rows) == 5 and rows[0] == rows[2] == [p % 8 for p in range(12)]
    assert rows[3] == PLAN.array[0].tolist()


def test_tensorrt_has_three_keys_and_true_layers(tmp_path: Path) -> None:
    lines = written("trtllm", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "num_slots", "initial_global_assignments", "  3", "  4", "layer_updates_per_iter",
    ]  # fmt: skip
    assert lines[0] == "num_slots: 12" and lines[-1] == "layer_updates_per_iter: 0"


def test_tensorrt_lists_may_be_written_as_dashes_or_over_lines(tmp_path: Path) -> None:
    rows = PLAN.array.tolist()
    text = "layer_updates_per_iter: 0\nnum_slots: 12\ninitial_global_assignments:\n  3:\n"
    text += "".join(f"  - {expert}\n" for expert in rows[0]) + f"  4: {json.dumps(rows[1], indent=1)}\n"
    (tmp_path / "file").write_text("# a comment\n" + text)
    assert (read_export("trtllm", tmp_path / "file", MODEL, 4).array == PLAN.array).all()


def test_vllm_counts_expert_layers_from_zero(tmp_path: Path) -> None:
    found = json.loads(written("vllm", tmp_path))
    assert set(found) == {
        "record_type", "version", "num_redundant_experts", "num_slots", "initial_global_assignments",
    }  # fmt: skip
    assert (found["record_type"], found["num_slots"], found["num_redundant_experts"]) == ("eplb_initial_mapping", 12, 4)
    assert list(found["initial_global_assignments"]) == ["0", "1"]
    assert json.loads(written("vllm-49572", tmp_path)) == PLAN.array.tolist()
    assert json.loads(written("vllm-34811", tmp_path, SAME)) == {"expert_to_ep_rank": [0, 0, 2, 1, 2, 1, 3, 3]}


def test_ascend_lists_devices(tmp_path: Path) -> None:
    found = json.loads(written("vllm-ascend", tmp_path))
    assert set(found) == {"moe_layer_count", "layer_list"} and found["moe_layer_count"] == 2
    layer = found["layer_list"][1]
    assert set(layer) == {"layer_id", "device_count", "device_list"} and layer["layer_id"] == 1
    assert layer["device_list"][2] == {"device_id": 2, "device_expert": PLAN.slots[1][2].tolist()}


def test_omni_is_a_pattern_of_ranks_layers_experts(tmp_path: Path) -> None:
    export(PLAN, "omni", tmp_path / "file.npy")
    pattern = np.load(tmp_path / "file.npy")
    assert pattern.dtype == np.int32 and pattern.shape == (4, 2, 8) and set(np.unique(pattern)) == {0, 1}
    assert pattern.sum((0, 2)).tolist() == [12, 12]


@pytest.mark.parametrize(
    ("engine", "text", "said"),
    [
        ("sglang", '{"physical_to_logical_map": [[0]], "version": 1}', "nothing else"),
        ("sglang", json.dumps({"physical_to_logical_map": [list(range(8))] * 2}), "dense ones too"),
        ("sglang", json.dumps({"physical_to_logical_map": [[0] * 8] * 3 + [list(range(8))] * 2}), "misses an expert"),
        ("trtllm", "num_slots: 8\nplacement:\n", "without a number"),
        ("trtllm", "num_slots: 8\nlayer_updates_per_iter: 0\n", "takes exactly"),
        ("vllm", '{"record_type": "eplb_initial_mapping", "version": 3}', "version 3"),
        ("vllm", "3", "none of vLLM's forms"),
        ("vllm-ascend", '{"moe_layer_count": 1, "layer_list": [{"layer_id": 3}]}', "does not have layers 0"),
        ("omni", "x", "cannot be read"),
        ("easyinfra", "{}", "no phy2log"),
        ("cuda", "{}", "expected one of sglang"),
    ],
)
def test_what_is_no_such_file_is_refused(engine: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(PlacementError, match=said):
        read_export(engine, tmp_path / "file", MODEL, 4)


def test_plans_that_do_not_fit_a_form_are_refused(tmp_path: Path) -> None:
    empty = Plan(8, (3, 4), 5, (np.array([[0, 1, 2], [3, 4, 5], [6, 7, -1], [0, 1, 2]]),) * 2)
    unequal = Plan(8, (3, 4), 5, (SAME.slots[0], PLAN.slots[1]))
    for engine in ("sglang", "trtllm", "vllm", "vllm-ascend"):
        with pytest.raises(PlacementError, match="empty slots"):
            export(empty, engine, tmp_path / "file")
    with pytest.raises(PlacementError, match="2 to 3 slots per rank"):
        export(unequal, "sglang", tmp_path / "file")
    with pytest.raises(PlacementError, match="no replicas"):
        export(PLAN, "vllm-34811", tmp_path / "file")
    assert not list(tmp_path.iterdir())
    for engine in ("vllm-ascend", "omni"):  # these may differ between layers
        path = tmp_path / "file.npy"
        export(unequal, engine, path)
        assert read_export(engine, path, MODEL, 4).slots_per_rank == (2, 3)
