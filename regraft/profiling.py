"""Profiling: the captured program and its lowered form, run operator by operator, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from regraft.artifact import Loaded
from regraft.build import Passes, Toolchain
from regraft.ir.device import Device
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.verify import relative_l2
from regraft.report.build import environment, main_dtype, operator_rows
from regraft.report.model import OperatorRow, Report
from regraft.report.profile import measure, observed, placeholder_values, with_measured


def profile_program(program: Program, pipeline: Passes, device: Device, runs: int = 5) -> Report:
    """Measure ``program`` as it was captured, rewrite and lower a copy, and measure that; the report holds both."""
    flat = _inputs(program)
    report = Report(target="cpu", environment=environment(device, main_dtype(program.graph)))
    values = placeholder_values(program, flat)
    measured = measure(program.module, values, runs)
    report.operators_before = with_measured(operator_rows(program.graph, device), measured)
    reference = program.callable()(*flat)
    twin, session = program.copy(), Session(log=report.log)
    report.phases.update(pipeline.run(twin, session))
    outputs, report.operators_after = _lowered(twin, session, device, runs, report)
    report.end_to_end_drift = _drift(outputs, reference)
    return report


def profile_artifact(loaded: Loaded, device: Device, runs: int = 5) -> Report:
    """Measure what an artifact holds, on the example inputs that it holds; the rest is the report inside it."""
    report = Report.from_json(loaded.report) if loaded.report is not None else Report()
    program = loaded.program
    report.environment = environment(device, main_dtype(program.graph))
    report.phases.pop("lowering", None)
    _, report.operators_after = _lowered(program, Session(), device, runs, report)
    return report


def _lowered(
    program: Program, session: Session, device: Device, runs: int, report: Report
) -> tuple[Any, list[OperatorRow]]:
    started = time.perf_counter()
    executable = Toolchain().lower(program, session)
    report.phases["lowering"] = time.perf_counter() - started
    flat = _inputs(program)
    module: fx.GraphModule = getattr(executable, "module")  # noqa: B009
    rows = _with_work_of_sources(operator_rows(observed(module, flat), device), module.graph, program, device)
    measured = measure(module, flat, runs)
    return executable(*_inputs(program)), with_measured(rows, measured)


def _with_work_of_sources(
    rows: list[OperatorRow], lowered: fx.Graph, program: Program, device: Device
) -> list[OperatorRow]:
    """A kernel that the cost model does not know does the work of the program's node that it was lowered from."""
    known = {row.node: row for row in operator_rows(program.graph, device) if row.known}
    sources = {node.name: known.get(node.meta.get("source", "")) for node in lowered.nodes}
    taken: set[str] = set()
    result: list[OperatorRow] = []
    for row in rows:
        source = None if row.known else sources.get(row.node)
        if source is not None and source.node not in taken:  # the work counts once
            taken.add(source.node)
            row = replace(
                row,
                flops=source.flops,
                bytes=source.bytes,
                predicted_seconds=source.predicted_seconds,
                known=True,
            )
        result.append(row)
    return result


def _inputs(program: Program) -> list[Any]:
    """The example inputs, cloned: a model may write to what it is given."""
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in program.example]


def _drift(outputs: Sequence[Any], reference: Sequence[Any]) -> float:
    pairs = zip(outputs, reference, strict=True)
    return max((relative_l2(a, b) for a, b in pairs if isinstance(a, torch.Tensor)), default=0.0)
