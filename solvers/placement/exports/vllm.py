"""vLLM, by the pull request that each form is proposed in; expert layers are counted from 0, dense ones left out.

- 41141, ``eplb_config.initial_mapping_path``: one JSON line with all layers;
- 49572, ``eplb_config.initial_expert_map_path``: a bare list of rows;
- 34811, ``--expert-placement-file``: one map for all layers, without replicas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.files import (
    check_layers,
    full_slots,
    read_json,
    whole_rows,
)
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.whole import write_text

FORMS = ("41141", "49572", "34811")


def write_vllm(plan: Plan, path: Path | str, pull_request: str = "41141") -> None:
    """Write the form of a pull request. Raises ``PlacementError`` where the plan does not fit it."""
    slots = full_slots(plan, "vLLM")
    if pull_request == "41141":
        content: Any = {
            "record_type": "eplb_initial_mapping",
            "version": 1,
            "num_redundant_experts": int(slots.shape[1]) - plan.num_experts,
            "num_slots": int(slots.shape[1]),
            "initial_global_assignments": {str(at): row for at, row in enumerate(slots.tolist())},
        }
    elif pull_request == "49572":
        content = slots.tolist()
    elif pull_request == "34811":
        content = {"expert_to_ep_rank": _ranks_of_experts(plan)}
    else:
        raise PlacementError(f"vLLM form {pull_request!r} was named; expected one of {', '.join(FORMS)}")
    write_text(path, json.dumps(content) + "\n")


def read_vllm_plan(
    path: Path | str, num_ranks: int, layer_ids: Sequence[int], num_hidden_layers: int, num_experts: int | None = None
) -> Plan:
    """Read any of the forms back. Raises ``PlacementError`` for other contents."""
    name, found = Path(path).name, read_json(path)
    if isinstance(found, dict) and set(found) == {"expert_to_ep_rank"}:
        rows = _rows_of_ranks(found["expert_to_ep_rank"], num_ranks, len(layer_ids), name)
    elif isinstance(found, dict) and found.get("record_type") == "eplb_initial_mapping":
        rows = _rows_of_mapping(found, name)
    elif isinstance(found, list):
        single = bool(found) and not isinstance(found[0], list)
        rows = whole_rows([found] * len(layer_ids) if single else found, name)
    else:
        raise PlacementError(f"{name!r} is none of vLLM's forms ({', '.join(FORMS)}); expected one of them")
    check_layers(len(rows), layer_ids, name)
    experts = int(rows.max()) + 1 if num_experts is None else num_experts
    return Plan.of_array(rows, experts, num_ranks, layer_ids, num_hidden_layers)


def _ranks_of_experts(plan: Plan) -> list[int]:
    slots = plan.array
    if slots.shape[1] != plan.num_experts or (slots != slots[0]).any():
        raise PlacementError(
            "a plan with replicas or with layers that differ was given; vLLM's form 34811 has one map for all layers "
            "and no replicas: use form 41141, or plan one placement for all layers"
        )
    ranks = np.empty(plan.num_experts, dtype=np.int64)
    ranks[slots[0]] = np.arange(plan.num_experts) // plan.slots_per_rank[0]
    return [int(rank) for rank in ranks]


def _rows_of_ranks(ranks: Any, num_ranks: int, layers: int, name: str) -> Slots:
    of_expert = whole_rows([ranks], name)[0]
    if (np.bincount(of_expert, minlength=num_ranks) * num_ranks != len(of_expert)).any():
        raise PlacementError(
            f"{name!r} gives ranks unequal numbers of experts; expected {len(of_expert)} / {num_ranks}"
        )
    row = np.argsort(of_expert, kind="stable")
    return np.tile(row, (layers, 1))


def _rows_of_mapping(found: dict[str, Any], name: str) -> Slots:
    if found.get("version") != 1:
        raise PlacementError(f"{name!r} is of version {found.get('version')}; expected 1")
    assigned = found.get("initial_global_assignments")
    if not isinstance(assigned, dict) or [str(at) for at in range(len(assigned))] != list(assigned):
        raise PlacementError(f"{name!r} does not place layers 0, 1, … in order; vLLM counts expert layers from 0")
    rows = whole_rows(list(assigned.values()), name)
    redundant = rows.shape[1] - (int(rows.max()) + 1)
    if found.get("num_slots") != rows.shape[1] or found.get("num_redundant_experts") != redundant:
        raise PlacementError(
            f"{name!r} has num_slots {found.get('num_slots')} and num_redundant_experts "
            f"{found.get('num_redundant_experts')}; its rows have {rows.shape[1]} and {redundant}"
        )
    return rows
