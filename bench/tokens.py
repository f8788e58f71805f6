"""Token reduction: which programs, how faithful, how fast.

    python -m bench.tokens [--part legality quality recognised speed] [--models …] [--json PATH]

"legality": families of encoders, reduced and checked by an oracle, or refused with the reason. "quality": every method
beside its random baseline on trained models, at the same number of products. "recognised": systems that reduce tokens
themselves, exact, beside eager and ``torch.compile``. "speed": reduced and unpadded encoders on the CPU beside exact
ones, ``torch.compile`` and eager, in turn. Each part has its own entry in the record.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.timing import RESULTS, device, versions, write_record

PARTS = ("legality", "quality", "recognised", "speed")


def legality(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Check every family and print the table."""
    from bench.tokens_legality import ROWS, check

    found = [check(row) for row in track(ROWS, "checking", console=console)]
    table = Table(title="families")
    for heading in ("family", "reduced at", "oracle", "relative error", "right", "refused because"):
        table.add_column(heading)
    for row in found:
        error = f"{row['error']:.0e}"
        right = "yes" if row["right"] else "NO"
        table.add_row(row["family"], str(row["reduced"]), row["oracle"], error, right, "; ".join(row["refused"]))
    console.print(table)
    return {"rows": found, "right": all(row["right"] for row in found)}


def quality(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Measure every method and print one table a model and removal."""
    from bench.tokens_quality import MODELS, measure, recommended

    rows: list[dict[str, Any]] = []
    for model in options.models or MODELS:
        with console.status(f"measuring {model}"):
            rows += measure(model)
    for model, removed in dict.fromkeys((row["model"], row["removed"]) for row in rows):
        part = [row for row in rows if (row["model"], row["removed"]) == (model, removed)]
        table = Table(title=f"{model}, as many products as where ToMe takes {removed} a layer: mean ± deviation")
        for heading in ("method", "tokens that go", *part[0]["figures"], "beats its random baseline"):
            table.add_column(heading, justify="right")
        for row in part:
            cells = [f"{value['mean']:.4f} ± {value['deviation']:.4f}" for value in row["figures"].values()]
            went = f"{sum(row['schedule'])}{'' if row['matched'] else ' (not as far)'}"
            table.add_row(row["method"], went, *cells, "yes" if row["beats_random"] else "no")
        console.print(table)
    found = recommended(rows)
    console.print(f"better than random wherever measured: {', '.join(found) or 'none'}")
    return {"rows": rows, "right": True}


def recognised(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Time every system and print the table."""
    from bench.tokens_recognised import ROWS, measure, show

    rows = []
    for name in options.models or ROWS:
        with console.status(f"measuring {name}"):
            rows.append(measure(name, options.rounds))
    show(rows, console)
    return {"rows": rows, "right": all(row["right"] for row in rows)}


def speed(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Time every row and print the table."""
    from bench.tokens_speed import ROWS, measure, show

    rows = []
    for name in options.models or ROWS:
        with console.status(f"measuring {name}"):
            rows.append(measure(name, options.rounds))
        show(rows, console)
    return {"rows": rows, "right": all(row["right"] for row in rows)}


#: Part -> what names its rows.
KEYS = {"legality": "family", "quality": "model", "recognised": "row", "speed": "row"}
RUNS: dict[str, Callable[[Console, argparse.Namespace], dict[str, Any]]] = {
    "legality": legality,
    "quality": quality,
    "recognised": recognised,
    "speed": speed,
}


def merged(path: Path, part: str, found: dict[str, Any]) -> dict[str, Any]:
    """The record's parts with these rows renewed: each row says with what command it was measured, each part on what
    machine."""
    parts: dict[str, Any] = {}
    if path.exists():
        parts = json.loads(path.read_text(encoding="utf-8")).get("parts", {})
    key, command = KEYS[part], f"python -m bench.tokens {shlex.join(_without_path(sys.argv[1:]))}".strip()
    fresh = {row[key] for row in found["rows"]}
    older = [row for row in parts.get(part, {}).get("rows", []) if row[key] not in fresh]
    rows = [*older, *({**row, "command": command} for row in found["rows"])]
    where = {"date": time.strftime("%Y-%m-%d"), "device": device(), "versions": versions()}
    parts[part] = {**where, **found, "rows": rows}
    return {"parts": parts}


def _without_path(arguments: list[str]) -> list[str]:
    """A command line but for where the record is kept, which is no part of what was measured."""
    if "--json" not in arguments:
        return arguments
    place = arguments.index("--json")
    return arguments[:place] + arguments[place + 2 :]


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts, print their tables and write the record; 1 where something is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--models", nargs="+", default=None, help="rows of a part; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS / "tokens.json", help="where the record is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=170)
    right = True
    for part in options.part:
        found = RUNS[part](console, options)
        right &= found["right"]
        write_record("tokens", {**merged(options.json, part, found), "command": "see parts"}, options.json)
    console.print(f"record: {options.json}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
