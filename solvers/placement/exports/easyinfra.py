"""EasyInfra: a JSON line ``{"phy2log": [[...], ...]}``, ``[expert layers, slots]``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.files import check_layers, full_slots, read_json, whole_rows
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.whole import write_text

KEY = "phy2log"


def write_easyinfra(plan: Plan, path: Path | str) -> None:
    """Write the file."""
    write_text(path, json.dumps({KEY: full_slots(plan, "EasyInfra").tolist()}) + "\n")


def read_easyinfra(path: Path | str, num_ranks: int, layer_ids: Sequence[int], num_hidden_layers: int) -> Plan:
    """Read the file back. Raises ``PlacementError`` for another form."""
    name, found = Path(path).name, read_json(path)
    if not isinstance(found, dict) or KEY not in found:
        raise PlacementError(f"{name!r} has no {KEY}; expected one JSON line with it")
    rows = whole_rows(found[KEY], name)
    check_layers(len(rows), layer_ids, name)
    return Plan.of_array(rows, int(rows.max()) + 1, num_ranks, layer_ids, num_hidden_layers)
