"""A trace for Perfetto (https://ui.perfetto.dev) or chrome://tracing: one row before, one row after.

Nodes lie one behind the other as the graph runs them. A slice is as long as the node's measured time, or its
predicted time where it was not measured; its arguments name the node, the rules that made it and the user's
line. Format: Google, "Trace Event Format", complete events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regraft.files import write_text
from regraft.report.model import OperatorRow, Report

_PROCESS = 1


def trace(report: Report) -> dict[str, Any]:
    """The report's operators as trace events; times in microseconds, as the format asks."""
    events: list[dict[str, Any]] = [_name("process_name", 0, report.model or "model")]
    for row, (name, operators) in enumerate(
        (("before", report.operators_before), ("after", report.operators_after)), start=1
    ):
        events.append(_name("thread_name", row, name))
        events += _slices(row, operators)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save_trace(report: Report, path: str | Path) -> None:
    """Write the trace to a file, whole or not at all."""
    write_text(path, json.dumps(trace(report), allow_nan=False) + "\n")


def _name(kind: str, row: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": row, "args": {"name": text}}


def _slices(row: int, operators: Sequence[OperatorRow]) -> Iterator[dict[str, Any]]:
    now = 0.0
    for item in operators:
        measured = item.measured_seconds is not None
        duration = 1e6 * (item.measured_seconds if item.measured_seconds is not None else item.predicted_seconds)
        yield {
            "ph": "X",
            "name": item.operator,
            "cat": "measured" if measured else "predicted",
            "pid": _PROCESS,
            "tid": row,
            "ts": now,
            "dur": duration,
            "args": {
                "node": item.node,
                "provenance": list(item.provenance),
                "line": item.user_line,
                "flops": item.flops,
                "bytes": item.bytes,
                "predicted_us": 1e6 * item.predicted_seconds,
            },
        }
        now += duration
