"""Choosing kernels: measured once a shape, remembered as data, and no second copy of a weight without a gain."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu import tuning
from regraft.codegen.cpu.attention_measured import AttentionShape, Sample
from regraft.codegen.cpu.linear_kernels import KERNELS, LinearShape, applicable
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.tuning import Tuner, TuningRecord

SHAPE = LinearShape(rows=6, in_features=4, out_features=5, dtype=torch.float32, has_bias=True)
WEIGHT = torch.ones(5, 4)


def measuring(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[list[str]]:
    """Every measurement gives ``seconds``; returns which kernels each one ran."""
    seen: list[list[str]] = []

    def measured(runs: dict[str, object], *how: object) -> dict[str, float]:
        seen.append(list(runs))
        return {name: seconds.get(name, 1.0) for name in runs}

    monkeypatch.setattr(tuning, "_interleaved", measured)
    return seen


def test_the_fastest_kernel_is_chosen_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = applicable(SHAPE)[-1]
    seen = measuring(monkeypatch, {fastest: 0.5})
    tuner = Tuner()
    assert [tuner.choose(SHAPE, WEIGHT) for _ in range(3)] == [fastest] * 3
    assert seen == [applicable(SHAPE)]
    tuner.choose(LinearShape(7, 4, 5, torch.float32), WEIGHT)
    assert len(seen) == 2


@pytest.mark.parametrize(("rows", "others", "measured"), [(90, 100, 1), (70, 100, 2), (5000, 9000, 1)])
def test_shapes_that_are_measured_nearly_alike_share_a_decision(
    monkeypatch: pytest.MonkeyPatch, rows: int, others: int, measured: int
) -> None:
    """Beyond what is measured at all, the number of rows makes no difference."""
    seen = measuring(monkeypatch, {})
    tuner, weight = Tuner(), torch.ones(512, 512)
    shape = LinearShape(others, 512, 512, torch.float32)
    tuner.choose(shape, weight)
    tuner.choose(replace(shape, rows=rows), weight)
    assert len(seen) == measured
    tuner.choose(replace(shape, rows=rows, activation="gelu"), weight)
    assert len(seen) == measured + 1


@pytest.mark.parametrize(("share", "chosen"), [(1.0, "plain"), (0.98, "plain"), (0.5, "onednn")])
def test_plain_is_kept_where_a_copy_of_the_weight_wins_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, share: float, chosen: str
) -> None:
    if len(applicable(SHAPE)) == 1:
        pytest.skip("no packed kernel on this machine")
    measuring(monkeypatch, {"plain": 1.0, "onednn": share, "native": 2.0})
    assert Tuner().choose(SHAPE, WEIGHT) == chosen


@pytest.mark.parametrize(("native", "chosen"), [(1.02, "native"), (1.1, "onednn"), (0.5, "native")])
def test_ours_joins_its_neighbours_where_it_is_as_fast(
    monkeypatch: pytest.MonkeyPatch, native: float, chosen: str
) -> None:
    if not {"native", "onednn"} <= set(applicable(SHAPE)):
        pytest.skip("there are not both kernels on this machine")
    measuring(monkeypatch, {"plain": 9.0, "onednn": 1.0, "native": native})
    assert Tuner().choose(SHAPE, WEIGHT) == chosen


@pytest.mark.parametrize(("native", "chosen"), [(1.02, "native"), (1.05, "sdpa"), (0.5, "native")])
def test_attention_of_pytorch_runs_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, native: float, chosen: str
) -> None:
    shape = AttentionShape(1, 2, 2, 8, 8, 4, 4, "all", False, torch.float32)
    measuring(monkeypatch, {"sdpa": 1.0, "native": native})
    sample = Sample({"sdpa": lambda: None, "native": lambda: None})
    assert Tuner().choose_attention(shape, lambda: sample) == chosen


@pytest.mark.parametrize(("call", "chosen"), [(0.0, "sdpa"), (0.02, "sdpa"), (0.1, "native")])
def test_calls_that_only_another_library_needs_are_counted(
    monkeypatch: pytest.MonkeyPatch, call: float, chosen: str
) -> None:
    """By itself ours is slower by a quarter; among its like it needs no call, and parts no others."""
    shape = AttentionShape(1, 2, 2, 8, 8, 4, 4, "all", False, torch.float32)
    measuring(monkeypatch, {"sdpa": 1.0, "native": 1.25})
    monkeypatch.setattr(tuning, "_call_seconds", lambda: call)
    sample = Sample({"sdpa": lambda: None, "native": lambda: None})
    assert Tuner().choose_attention(shape, lambda: sample) == chosen


def test_a_call_that_computes_nothing_takes_some_time() -> None:
    if not NATIVE.missing():
        assert tuning._call_seconds() > 0.0


def lines(record: TuningRecord) -> bytes:
    """A record as an artifact carries it."""
    return json.dumps(record.to_json()).encode()


def test_records_given_back_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(monkeypatch, {})
    tuner = Tuner()
    tuner.remember(lines(TuningRecord(SHAPE, torch.get_num_threads(), "onednn", {"onednn": 1.0})))
    assert tuner.choose(SHAPE, WEIGHT) == "onednn" and seen == []


def test_a_record_of_another_number_of_threads_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(monkeypatch, {})
    tuner = Tuner()
    tuner.remember(lines(TuningRecord(SHAPE, torch.get_num_threads() + 1, "onednn", {})))
    tuner.choose(SHAPE, WEIGHT)
    assert len(seen) == 1


def test_records_are_json() -> None:
    record = TuningRecord(SHAPE, 2, "plain", {"plain": 0.25})
    assert TuningRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    symbolic = TuningRecord(LinearShape(None, 1, 2, torch.bfloat16, activation="gelu"), 1, "plain", {})
    assert TuningRecord.from_json(json.loads(json.dumps(symbolic.to_json()))) == symbolic


def test_decisions_survive_an_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(monkeypatch, {})
    first, second = Tuner(), Tuner()
    first.choose(SHAPE, WEIGHT)
    second.remember(first.to_jsonl())
    assert second.records == first.records and len(seen) == 1


def test_tuners_of_a_process_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(monkeypatch, {})
    decided: dict[Any, TuningRecord] = {}
    first, second, apart = Tuner(decided=decided), Tuner(decided=decided), Tuner()
    assert first.choose(SHAPE, WEIGHT) == second.choose(SHAPE, WEIGHT) and len(seen) == 1
    assert second.to_jsonl() == first.to_jsonl()  # each says what its own model runs on
    apart.choose(SHAPE, WEIGHT)
    assert len(seen) == 2


def test_what_another_tuner_decided_does_not_count_where_its_kernel_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(monkeypatch, {})
    key = SHAPE, torch.get_num_threads()
    tuner = Tuner(decided={key: TuningRecord(*key, "of another machine", {})})
    assert tuner.choose(SHAPE, WEIGHT) != "of another machine" and len(seen) == 1


def test_a_shape_with_one_kernel_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(monkeypatch, {})
    narrow = LinearShape(6, 4, 5, torch.bfloat16)
    assert Tuner().choose(narrow, WEIGHT.bfloat16()) == "plain" and seen == []


def test_a_kernel_that_this_machine_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*given: object) -> Tensor:
        raise RuntimeError("could not create a primitive")

    seen = measuring(monkeypatch, {"plain": 2.0})
    for name in KERNELS:
        if name != "plain":
            monkeypatch.setitem(KERNELS, name, unsupported)
    assert Tuner().choose(SHAPE, WEIGHT) == "plain" and seen in ([["plain"]], [])


@pytest.mark.parametrize(("out_features", "measured"), [(130, 130), (5000, 2560)])
def test_a_part_of_a_large_weight_is_measured_by_whole_panels(
    monkeypatch: pytest.MonkeyPatch, out_features: int, measured: int
) -> None:
    """2621 rows of a weight of 200 columns would make as many numbers as are measured, and end inside a panel."""
    shape, shapes = replace(SHAPE, in_features=200, out_features=out_features, has_bias=False), set()
    measuring(monkeypatch, {})
    compiled = tuning._compiled

    def noted(name: str, shape: LinearShape, weight: Tensor, *how: Any) -> Any:
        shapes.add(tuple(weight.shape))
        return compiled(name, shape, weight, *how)

    monkeypatch.setattr(tuning, "_compiled", noted)
    Tuner().choose(shape, torch.ones(out_features, 200))
    assert (measured, 200) in shapes and max(shapes)[0] <= max(measured, tuning._NEIGHBOUR)


def test_the_last_result_lives_while_the_next_is_made() -> None:
    """Else the C library may give its pages back after each call, and the faults would be measured."""
    alive: list[int] = []
    made: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def run() -> Tensor:
        alive.append(len(made))
        result = torch.ones(1)
        made.add(result)
        return result

    tuning._interleaved({"one": run, "other": run})
    assert alive[0] == 0 and set(alive[1:]) == {1}


def test_real_measurements_name_every_kernel_that_ran() -> None:
    tuner = Tuner()
    chosen = tuner.choose(SHAPE, WEIGHT)
    (record,) = tuner.records.values()
    assert chosen in KERNELS and all(seconds > 0 for seconds in record.seconds.values())
