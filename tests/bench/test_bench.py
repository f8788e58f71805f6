"""The benches run at their smallest, and their numbers mean what their columns say."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft.codegen.timing
import regraft.ir.program
import regraft.passes.base
import regraft.solvers
from bench import scaling, shard, variants
from bench.cold import PeakMemory, write_bytecode
from bench.decoder import PlainDecoder
from bench.timing import time_in_turn, write_record


def test_timed_calls_take_turns() -> None:
    order: list[str] = []
    times = time_in_turn(
        {name: (lambda name=name: order.append(name)) for name in "ab"}, rounds=4, warm_up=0, shortest=0
    )
    turns = order[2:]  # the first call of each sets its repeats
    assert turns[0::2] == turns[1::2] == ["a", "b", "b", "a", "a", "b", "b", "a"]  # one call wakes, one is measured
    assert len(times["a"].milliseconds) == 4 and times["b"].median >= 0


def test_a_record_names_device_versions_and_command(tmp_path: Path) -> None:
    path = write_record("scaling", {"rows": [1]}, tmp_path / "deep" / "r.json")
    record = json.loads(path.read_text())
    assert record["rows"] == [1] and record["command"].startswith("python -m bench.scaling")
    assert record["versions"]["torch"] == version("torch") and record["device"]["threads"] >= 1


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory(interval=0.0005) as peak:
        held = [torch.full((1 << 22,), float(number)) for number in range(4)]
        total = sum(float(tensor.sum()) for tensor in held)
        del held
    assert total > 0 and peak.added > 4 * (1 << 22) * 4 * 0.9


def test_a_cold_compile_finds_the_bytecode_of_every_package() -> None:
    write_bytecode()
    for module in (regraft, regraft.ir.program, regraft.passes.base, regraft.codegen.timing, regraft.solvers):
        assert module.__file__ is not None
        assert Path(cache_from_source(module.__file__)).is_file()


def test_the_plain_decoder_is_causal() -> None:
    """The logits of a position do not change with later tokens."""
    torch.manual_seed(0)
    model, tokens = PlainDecoder(2, hidden=16).eval(), torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5:] = 200
    with torch.no_grad():
        first, second = model(tokens), model(changed)
    assert torch.allclose(first[:, :5], second[:, :5], atol=1e-6)
    assert not torch.allclose(first[:, 5:], second[:, 5:], atol=1e-2)


def test_ratios_are_those_of_the_deepest_over_the_shallowest() -> None:
    def row(layers: int, seconds: float) -> dict[str, Any]:
        return {"model": "m", "layers": layers, "verify": "off", "passes": seconds, "total": 2 * seconds}

    (found,) = scaling.ratios([row(10, 1.0), row(30, 9.0), row(100, 8.0)], [10, 30, 100])
    assert (found["passes"], found["total"], found["deepest_seconds"]) == (8.0, 8.0, 16.0)


@pytest.mark.parametrize("model", ["plain", "llama"])
def test_a_compile_is_told_by_phase(model: str) -> None:
    if model == "llama":
        pytest.importorskip("transformers")
    split = scaling.phases(scaling.MODELS[model](1), "each")
    assert all(seconds > 0 for seconds in split.values())
    assert sum(split.values()) - split["total"] <= split["total"] * 1.01


def test_an_attention_that_should_be_found_is() -> None:
    rows = [variants.measure(item) for item in (variants.VARIANTS[0], variants.NEAR_MISSES[0])]
    assert [row.outcome for row in rows] == ["found", "refused"] and all(row.passed for row in rows)


def test_a_row_that_is_not_as_expected_does_not_pass() -> None:
    kept = variants.NEAR_MISSES[0]
    wrong = variants.Variant(kept.name, kept.function, found=True)
    assert not variants.measure(wrong).passed


def test_plans_of_the_sharding_bench_hold_every_expert_and_some_twice() -> None:
    plan = shard.random_plan(experts=8, layers=(1, 3), ranks=4, redundant=3, seed=0)
    assert plan.slots_per_rank == (3, 3) and plan.layer_ids == (1, 3)
    assert plan.replicas.min() == 1 and plan.replicas.sum(1).tolist() == [12, 12]
