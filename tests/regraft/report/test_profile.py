"""Every node is timed, and the times become rows, groups and a trace."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft.ir.capture import capture
from regraft.ir.device import Device
from regraft.report.build import environment, main_dtype, operator_rows
from regraft.report.profile import grouped, measure, placeholder_values, with_measured
from regraft.report.trace import save_trace, trace
from tests.regraft.report.sample import row, sample

DEVICE = Device("test", {"float32": 1e9}, 1e9, "test")


def test_every_call_is_timed() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (torch.randn(2, 4),))
    runs: list[int] = []
    values = placeholder_values(program, program.example)
    seconds = measure(program.module, values, runs=3, warm_up=1, advance=lambda: runs.append(1))
    rows = with_measured(operator_rows(program.graph, DEVICE), seconds)
    assert [item.operator for item in rows] == ["linear", "relu", "linear"]
    assert all(item.measured_seconds is not None and item.measured_seconds > 0 for item in rows)
    assert len(runs) == 4


def test_a_median_needs_a_run() -> None:
    program = capture(nn.ReLU(), (torch.randn(2),))
    with pytest.raises(ValueError, match="at least one run"):
        measure(program.module, placeholder_values(program, program.example), runs=0)


def test_rows_are_grouped_by_operator_and_line() -> None:
    rows = [
        row("a", "add", 1, 1, 1.0, 2.0),
        row("b", "add", 1, 1, 1.0, 3.0),
        row("c", "mul", 1, 1, 7.0, None),
    ]
    assert [(group.operator, group.calls, group.seconds) for group in grouped(rows)] == [
        ("mul", 1, 7.0),
        ("add", 2, 5.0),
    ]


def test_the_environment_names_device_rates_and_versions() -> None:
    program = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    place = environment(DEVICE, main_dtype(program.graph))
    assert (place.device, place.dtype, place.peak_flops) == ("test", "float32", 1e9)
    assert place.versions["torch"] == version("torch") and place.threads == torch.get_num_threads()


def test_the_trace_has_a_row_before_and_one_after(tmp_path: Path) -> None:
    save_trace(sample(), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {1: "before", 2: "after"}
    slices = [event for event in events if event["ph"] == "X" and event["tid"] == 2]
    assert [event["name"] for event in slices] == ["regraft.linear", "regraft.rms_norm", "softmax"]
    assert slices[0]["dur"] == pytest.approx(1700) and slices[1]["ts"] == pytest.approx(1700)
    assert slices[0]["args"]["provenance"] == ["fuse-rms-norm(linear_fused)"]
    assert slices[0]["args"]["line"].endswith("modeling_llama.py:31 in forward")


def test_slices_that_were_not_measured_say_so() -> None:
    slices = [event for event in trace(sample(measured=False))["traceEvents"] if event["ph"] == "X"]
    assert {event["cat"] for event in slices} == {"predicted"}
    assert slices[0]["dur"] == pytest.approx(2000)
