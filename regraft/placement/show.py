"""A comparison of placements as a table for people and as plain data for programs."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from regraft.report import units
from regraft.solvers.placement.compare import Comparison, Row
from regraft.solvers.placement.migration import Migration

WIDTH = 128


def comparison_text(comparison: Comparison, aggregate: str = "weighted") -> str:
    """Every method in a row, ``auto`` first; then what was skipped, and the migration where there is one."""
    auto = comparison.auto
    held_out = auto.held_out is not None
    where = "on held-out batches" if held_out else "on the planned batches"
    table = Table(title=f"Placement ({where} from copies on)", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("method", no_wrap=True)
    unit = "slowdown" if aggregate == "min-max" else "time/batch"
    for name in (unit, "gap", "balance", "held out", "node copies", "ranks/token", "layer P99", "memory", "took"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*_cells(row, aggregate))
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    lines = [*(line.rstrip() for line in text.getvalue().rstrip().splitlines()), *_remarks(comparison)]
    if auto.planned.migration is not None:
        lines.append(migration_text(auto.planned.migration))
    solution = comparison.solution
    below = _objective(solution.bound, aggregate)
    lines.append(f"auto stopped: {solution.stop}; the lower bound is {below}, a gap of {solution.gap:.1%}")
    return "\n".join(lines)


def migration_text(moved: Migration) -> str:
    """One sentence: what moves from the plan in service, and when it has paid."""
    if moved.experts == 0:
        return "migration: nothing moves"
    pays = "never pays back"
    if math.isfinite(moved.payback_batches):
        pays = f"pays back after {math.ceil(moved.payback_batches)} batches"
    return (
        f"migration: {moved.experts} experts, {units.count(moved.bytes, 'B')} "
        f"({units.count(moved.cross_node_bytes, 'B')} between nodes), {units.seconds(moved.seconds)}; {pays}"
    )


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """The same as plain data."""
    solution, moved = comparison.solution, comparison.auto.planned.migration
    data: dict[str, Any] = {
        "solution": {
            "objective": solution.value,
            "bound": solution.bound,
            "gap": solution.gap,
            "stop": solution.stop,
            "seconds": solution.seconds,
            "notes": list(solution.notes),
        },
        "methods": [row.figures() for row in comparison.rows],
        "skipped": comparison.skipped,
        "migration": None,
    }
    if moved is not None:
        data["migration"] = {
            "experts": moved.experts,
            "bytes": moved.bytes,
            "cross_node_bytes": moved.cross_node_bytes,
            "seconds": moved.seconds,
            "payback_batches": moved.payback_batches if math.isfinite(moved.payback_batches) else None,
        }
    return data


def _cells(row: Row, aggregate: str) -> tuple[str, ...]:
    return (
        row.method,
        _objective(row.planned.objective, aggregate),
        f"{row.gap:.1%}",
        f"{row.planned.balancedness:.3f}",
        "-" if row.held_out is None else f"{row.held_out.balancedness:.3f}",
        f"{row.scored.cross_node_copies:.3f}",
        f"{row.scored.destination_ranks:.2f}",
        units.seconds(row.scored.layer_p99),
        units.count(row.planned.memory_per_rank, "B"),
        units.seconds(row.seconds),
    )


def _objective(value: float, aggregate: str) -> str:
    return f"{value:.4f}x" if aggregate == "min-max" else units.seconds(value)


def _remarks(comparison: Comparison) -> list[str]:
    lines = [f"{row.method} is no valid plan here: {_first(row.broken)}" for row in comparison.rows if row.broken]
    lines += [f"{name} was skipped: {reason}" for name, reason in comparison.skipped.items()]
    return lines + [f"note: {note}" for note in comparison.solution.notes]


def _first(sentences: tuple[str, ...]) -> str:
    more = len(sentences) - 1
    return sentences[0] + (f" (and {more} more)" if more else "")
