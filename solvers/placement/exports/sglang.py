"""SGLang: ``--init-expert-location FILE.json`` (released), a row for every layer of the model, dense ones included.

The dictionary is passed on as arguments, so it has the one key ``physical_to_logical_map`` and nothing else. Dense
layers get the row that SGLang itself starts with: a row that missed an expert would break static dispatch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.files import full_slots, read_json, whole_rows
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.whole import write_text

KEY = "physical_to_logical_map"


def sglang_map(plan: Plan) -> dict[str, list[list[int]]]:
    """What the file holds; the face may also save it as a ``.pt`` of one integer tensor."""
    slots = full_slots(plan, "SGLang")
    rows = np.tile(np.arange(slots.shape[1]) % plan.num_experts, (plan.num_hidden_layers, 1))
    rows[list(plan.layer_ids)] = slots
    return {KEY: rows.tolist()}


def write_sglang(plan: Plan, path: Path | str) -> None:
    """Write the ``.json`` file. Set ``--ep-num-redundant-experts`` to the plan's slots less its experts."""
    write_text(path, json.dumps(sglang_map(plan)))


def read_sglang(path: Path | str, num_ranks: int, layer_ids: Sequence[int]) -> Plan:
    """Read the file back as a plan of the expert layers. Raises ``PlacementError`` for another form."""
    return plan_of_map(read_json(path), num_ranks, layer_ids, Path(path).name)


def plan_of_map(found: Any, num_ranks: int, layer_ids: Sequence[int], name: str = "the map") -> Plan:
    """The same from the dictionary."""
    if not isinstance(found, dict) or set(found) != {KEY}:
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise PlacementError(f"{name!r} has {keys}; SGLang takes {KEY} and nothing else")
    rows = whole_rows(found[KEY], name)
    if len(rows) <= max(layer_ids):
        raise PlacementError(
            f"{name!r} has {len(rows)} rows for expert layers up to {max(layer_ids)}; "
            "SGLang counts every layer of the model, dense ones too: add their rows"
        )
    experts = int(rows.max()) + 1
    for layer, row in enumerate(rows):
        if len(np.unique(row)) != experts:
            raise PlacementError(
                f"{name!r}, layer {layer} misses an expert of {experts}; expected every one in each row"
            )
    return Plan.of_array(rows[list(layer_ids)], experts, num_ranks, layer_ids, len(rows))
