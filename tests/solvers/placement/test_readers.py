"""Each reader gives the trace that was recorded; what is another form is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.readers.counts_json import read_counts_json
from regraft.solvers.placement.readers.native import read_trace, write_trace
from regraft.solvers.placement.readers.sglang import trace_of_passes, trace_of_statistics
from regraft.solvers.placement.readers.tensorrt_llm import read_tensorrt_llm
from regraft.solvers.placement.readers.vllm import read_vllm
from regraft.solvers.placement.trace import Trace, count_experts
from tests.solvers.placement.cases import random_experts, random_trace


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_our_own_file_gives_the_trace_back(tmp_path: Path, ending: str) -> None:
    trace = random_trace()
    counts = Trace(8, 2, (1, 2, 5), tuple(trace.batches), 7, "model", {"all": np.ones((2, 8, 8))})
    path = tmp_path / f"trace.{ending}"
    write_trace(counts, path)
    found = read_trace(path)
    assert (found.layer_ids, found.num_hidden_layers, found.model_name) == ((1, 2, 5), 7, "model")
    assert all((a.counts == b.counts).all() for a, b in zip(found.batches, counts.batches, strict=True))
    assert (found.transitions["all"] == 1).all()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(PlacementError, match=r"'other.npz' is no trace file"):
        read_trace(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(PlacementError, match="cannot be read"):
        read_trace(tmp_path / "broken.npz")
    with pytest.raises(PlacementError, match=r"\.npz or \.safetensors"):
        write_trace(random_trace(), tmp_path / "trace.txt")


def test_sglang_statistics_leave_out_dense_layers() -> None:
    count = np.zeros((2, 4, 6), dtype=np.int32)
    count[:, 2:] = np.arange(6) + 1
    trace = trace_of_statistics({"rank": 0, "logical_count": count}, top_k=2)
    assert trace.layer_ids == (2, 3) and trace.num_hidden_layers == 4
    assert (trace.batches[0].counts == np.arange(6) + 1).all()
    with pytest.raises(PlacementError, match="of 4 layers was given for expert layers up to 60"):
        trace_of_statistics({"logical_count": count}, 2, [3, 60])
    with pytest.raises(PlacementError, match="expected logical_count"):
        trace_of_statistics({"records": []}, 2)
    coupled = {"logical_count": count, "logical_count_layout": "rank_layer_expert"}
    assert (trace_of_statistics(coupled, 2).batches[0].counts == 2 * (np.arange(6) + 1)).all()


def test_sglang_physical_choices_become_logical_experts() -> None:
    slots = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
    chosen = np.array([[[4, 2], [5, -1]], [[0, 5], [1, 2]]], dtype=np.int32)
    records = [
        {"rank": 3, "forward_mode": 2, "topk_ids_of_layer": chosen},
        {"rank": 1, "forward_mode": 1, "global_physical_count": np.array([[1, 2, 3, 4, 5, 6]] * 2)},
    ]
    trace = trace_of_passes({"records": records, "last_physical_to_logical_map": slots}, top_k=2)
    decode, prefill = trace.batches
    assert decode.experts is not None and decode.source_rank is not None
    assert decode.experts.tolist() == [[[0, 2], [1, -1]], [[3, 2], [2, 1]]]
    assert (decode.phase, prefill.phase) == ("decode", "prefill") and set(decode.source_rank) == {3}
    assert prefill.counts.tolist() == [[6, 8, 3, 4], [4, 3, 8, 6]]


def test_tensorrt_counts_sum_over_ranks_and_raw_choices_win(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 8, "num_experts_per_token": 2}))
    counts = np.arange(8, dtype=np.int32)
    for rank in range(2):
        save_file(
            {f"{i}_{layer}": counts for i in (100, 101) for layer in (3, 4)}, tmp_path / f"rank{rank}.safetensors"
        )
    trace = read_tensorrt_llm(tmp_path)
    assert trace.layer_ids == (3, 4) and len(trace.batches) == 2
    assert (trace.batches[1].counts == 2 * counts).all()
    raw = [random_experts(rank, 2, 5, 8, 2) for rank in range(2)]
    for rank in range(2):
        own = {f"100_{layer}": raw[rank][at].copy() for at, layer in enumerate((3, 4))}
        save_file(own, tmp_path / f"rank{rank}_raw.safetensors")
    trace = read_tensorrt_llm(tmp_path)
    assert trace.batches[0].source_rank is not None
    assert trace.batches[0].source_rank.tolist() == [0] * 5 + [1] * 5
    assert (trace.batches[0].counts == count_experts(np.concatenate(raw, axis=1), 8)).all()


def test_tensorrt_missing_layer_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_token": 2}))
    one = np.ones(4, dtype=np.int32)
    save_file({"7_3": one, "7_4": one, "8_3": one}, tmp_path / "rank0.safetensors")
    with pytest.raises(PlacementError, match="layer 4 is missing in iteration 8"):
        read_tensorrt_llm(tmp_path)


def test_vllm_slot_loads_become_expert_counts(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    lines: list[dict[str, Any]] = [
        {"record_type": "eplb_load_meta"},
        {
            "record_type": "eplb_load_stats",
            "version": 1,
            "expert_load": [[1, 2, 3, 4]],
            "p2l_map": [[0, 1, 2, 0]],
        },
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    trace = read_vllm(path, top_k=1, layer_ids=[5])
    assert trace.batches[0].counts.tolist() == [[5, 2, 3]] and trace.layer_ids == (5,)
    path.write_text('{"record_type": "other"}')
    with pytest.raises(PlacementError, match="line 1 is of record_type 'other'"):
        read_vllm(path, 1)


def test_recorded_counts_and_their_joint_counts(tmp_path: Path) -> None:
    recorded = {
        "model": "m", "num_experts": 3, "top_k": 2, "num_model_layers": 9, "layers_recorded": [0, 7],
        "expert_counts": {"code": [[4, 3, 1], [2, 2, 4]]},
        "crosslayer_rank_aligned": {"code": {"0->7": [[2, 1, 1], [0, 1, 2], [0, 0, 1]]}},
    }  # fmt: skip
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(recorded))
    trace = read_counts_json(path)
    assert trace.scenarios == ("code",) and trace.layer_ids == (0, 7) and trace.num_hidden_layers == 9
    assert trace.transitions["code"].sum() == 8
    recorded["expert_counts"] = {"code": [[4, float("nan"), 1], [2, 2, 4]]}
    path.write_text(json.dumps(recorded))
    with pytest.raises(PlacementError, match=r"domain 'code' holds counts that are not finite"):
        read_counts_json(path)
