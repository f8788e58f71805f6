"""``python -m bench.coverage``: what regraft recognises in 27 model families, and whether the outputs stay equal.

Every family runs with eager and, where it is offered, sdpa attention, with and without a padding mask, in fp32 and
bf16. For each kind of site the table shows found/expected; the error is the relative L2 distance of all outputs from
the original model's. A row passes when everything expected is found and the error is at most 1e-5 (fp32) or 2e-2
(bf16). Exit status 1 when a row does not pass. ``--more`` runs the families of ``more_families.py`` instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves

from bench.families import FAMILIES, KINDS, Family, expected_sites
from bench.more_families import OTHERS
from bench.timing import write_record

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Row:
    """One configuration: counts found and expected by kind, the error, and what failed."""

    family: str
    implementation: str
    padded: bool
    dtype: str
    found: dict[str, int]
    expected: dict[str, int]
    error: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether every site was found and the outputs agree."""
        complete = all(self.found.get(kind, 0) == number for kind, number in self.expected.items())
        return not self.failure and complete and self.error <= TOLERANCE[self.dtype]


def measure(name: str, implementation: str, padded: bool, dtype_name: str) -> Row:
    """Compile one configuration and compare it with its original."""
    torch.set_num_threads(1)
    logging.getLogger("regraft").setLevel(logging.ERROR)
    family = next(item for item in (*FAMILIES, *OTHERS) if item.name == name)
    dtype: torch.dtype = getattr(torch, dtype_name)
    model = family.build(implementation, dtype)
    kwargs = family.inputs(padded, dtype)
    expected = expected_sites(model, kwargs)
    try:
        found, error = _compile_and_compare(model, kwargs)
        return Row(name, implementation, padded, dtype_name, found, expected, error)
    except Exception as failure:  # a row that fails is shown, the others still run
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        return Row(name, implementation, padded, dtype_name, {}, expected, float("inf"), reason)


def _compile_and_compare(model: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[dict[str, int], float]:
    import regraft

    fast = regraft.compile(model, kwargs=kwargs)
    with torch.no_grad():
        wanted, given = tree_leaves(model(**kwargs)), tree_leaves(fast(**kwargs))
    recognized = fast.report.recognized
    found = {kind: recognized.get(kind, 0) for kind in KINDS}
    found["norm"] = recognized.get("rms_norm", 0) + recognized.get("layer_norm", 0)
    events = [event.reason for event in fast.report.events]
    if events:
        raise RuntimeError(f"the original ran instead: {events[0]}")
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(given, wanted, strict=True)
        if isinstance(b, torch.Tensor)
    ]
    return found, max(errors)


def configurations(families: list[Family], dtypes: list[str]) -> list[tuple[str, str, bool, str]]:
    """All rows to measure."""
    return [
        (family.name, implementation, padded, dtype)
        for family in families
        for implementation in family.implementations
        for padded in ((False,) if family.image else (False, True))
        for dtype in dtypes
    ]


def show(rows: list[Row]) -> Table:
    """The table of all rows."""
    table = Table(title="regraft coverage: found/expected sites, relative L2 error of the outputs")
    for column in ("family", "attention", "mask", "dtype", *KINDS, "error", ""):
        table.add_column(column)
    for row in rows:
        counts = [f"{row.found.get(kind, 0)}/{row.expected[kind]}" if row.expected[kind] else "-" for kind in KINDS]
        verdict = "ok" if row.passed else (row.failure or "FAILS")
        mask = "padding" if row.padded else "none"
        table.add_row(row.family, row.implementation, mask, row.dtype, *counts, f"{row.error:.1e}", verdict)
    return table


def main() -> int:
    """Measure, print and, with ``--json``, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="", help="comma-separated names; all by default")
    parser.add_argument("--more", action="store_true", help="further families instead of the 27")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    wanted = set(filter(None, options.families.split(",")))
    listed = OTHERS if options.more else FAMILIES
    families = [family for family in listed if not wanted or family.name in wanted]
    todo = configurations(families, options.dtypes.split(","))
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(measure, *zip(*todo, strict=True)))
    Console(width=150).print(show(rows))
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(rows)} rows pass")
    if options.json is not None:
        results = [{**asdict(row), "passed": row.passed} for row in rows]
        write_record("coverage", {"passed": passed, "rows": results}, options.json)
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
