"""vLLM-Ascend and MindIE: ``expert_map_path`` (.json), experts per device and layer; expert layers counted from 0.

The map is by logical expert: no device may hold one twice, and all devices of a layer hold equally many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.files import check_layers, read_json
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.repair import duplicates
from regraft.solvers.placement.whole import write_text


def write_vllm_ascend(plan: Plan, path: Path | str) -> None:
    """Write the file. Raises ``PlacementError`` for empty slots, or an expert twice on a rank."""
    for layer, table in zip(plan.layer_ids, plan.slots, strict=True):
        if (table < 0).any() or duplicates(table):
            raise PlacementError(
                f"layer {layer} has empty slots or an expert twice on a rank; vLLM-Ascend takes neither"
            )
    layers = [
        {
            "layer_id": at,
            "device_count": plan.num_ranks,
            "device_list": [{"device_id": rank, "device_expert": row} for rank, row in enumerate(table.tolist())],
        }
        for at, table in enumerate(plan.slots)
    ]
    write_text(path, json.dumps({"moe_layer_count": plan.num_layers, "layer_list": layers}))


def read_vllm_ascend(path: Path | str, layer_ids: Sequence[int], num_hidden_layers: int) -> Plan:
    """Read the file back. Raises ``PlacementError`` for another form."""
    name, found = Path(path).name, read_json(path)
    try:
        layers = sorted(found["layer_list"], key=lambda layer: int(layer["layer_id"]))
        if [layer["layer_id"] for layer in layers] != list(range(found["moe_layer_count"])):
            raise PlacementError(f"{name!r} does not have layers 0 to {found['moe_layer_count'] - 1}, each once")
        tables: list[Slots] = []
        for layer in layers:
            devices = sorted(layer["device_list"], key=lambda device: int(device["device_id"]))
            if [device["device_id"] for device in devices] != list(range(layer["device_count"])):
                raise PlacementError(f"{name!r}, layer {layer['layer_id']} does not have each device once")
            tables.append(np.array([device["device_expert"] for device in devices], dtype=np.int64))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, PlacementError):
            raise
        raise PlacementError(f"{name!r} is no expert map of vLLM-Ascend: {error!r}") from error
    check_layers(len(tables), layer_ids, name)
    experts = max(int(table.max()) for table in tables) + 1
    plan = Plan(experts, tuple(layer_ids), num_hidden_layers, tuple(tables))
    if any(duplicates(table) for table in tables):
        raise PlacementError(f"{name!r} holds an expert twice on a device; the map is by logical expert")
    return plan
