"""What SGLang's expert distribution recorder writes, as arrays that the caller has loaded.

The files are torch dictionaries; who reads them loads with ``weights_only`` and hands over numpy arrays. Rows count
dense layers too: the rows of dense layers are left out here, given the true ids of the expert layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.trace import Batch, Trace, count_experts, whole_counts

#: SGLang's forward modes by number and by name: 1 extends (prefill), 2 decodes, 3 mixes both.
_PHASES = {1: "prefill", 2: "decode", 3: "mixed", "extend": "prefill", "prefill": "prefill", "decode": "decode"}


def trace_of_statistics(
    recorded: Mapping[str, Any], top_k: int, layer_ids: Sequence[int] | None = None, scenario: str = "all"
) -> Trace:
    """Modes ``stat`` and ``stat_approx``: ``logical_count`` ``[steps, layers, experts]`` or ``[layers, experts]``.

    With ``logical_count_layout`` "rank_layer_expert" (the coupled balancer) the first axis is ranks and is summed.
    ``layer_ids`` defaults to the layers with any count. Raises ``PlacementError`` where the count is missing.
    """
    if "logical_count" not in recorded:
        raise PlacementError(
            f"a recording with {', '.join(map(str, recorded)) or 'nothing'} was given; expected logical_count; "
            "record with mode stat, or read it as per_token"
        )
    counts = whole_counts(np.asarray(recorded["logical_count"]), "logical_count")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3:
        raise PlacementError(f"logical_count of shape {counts.shape} was given; expected [steps, layers, experts]")
    if recorded.get("logical_count_layout") == "rank_layer_expert":
        counts = counts.sum(0, keepdims=True)
    chosen = _expert_layers(counts.sum((0, 2)), layer_ids)
    steps = [step for step in counts if step.any()]
    batches = tuple(Batch(step[list(chosen)], scenario=scenario) for step in steps)
    return Trace(counts.shape[2], top_k, chosen, batches, counts.shape[1])


def trace_of_passes(
    recorded: Mapping[str, Any], top_k: int, layer_ids: Sequence[int] | None = None, scenario: str = "all"
) -> Trace:
    """Modes ``per_pass`` and ``per_token``: ``records`` and ``last_physical_to_logical_map`` ``[layers, slots]``.

    Recorded ids are physical; they become logical experts by the map. A record's rank is its tokens' source rank.
    """
    if "records" not in recorded or "last_physical_to_logical_map" not in recorded:
        raise PlacementError(
            "a recording without records or last_physical_to_logical_map was given; expected both; "
            "record with mode per_token"
        )
    slots = np.asarray(recorded["last_physical_to_logical_map"]).astype(np.int64)
    experts = int(slots.max()) + 1
    records = list(recorded["records"])
    logical = [_logical_counts(record, slots, experts) for record in records]
    total = np.sum([counts.sum(1) for counts in logical], axis=0) if logical else np.zeros(len(slots))
    chosen = _expert_layers(np.asarray(total), layer_ids)
    batches = tuple(
        _batch(record, counts, slots, chosen, experts, scenario)
        for record, counts in zip(records, logical, strict=True)
    )
    return Trace(experts, top_k, chosen, batches, len(slots))


def recorded_layers(recorded: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers with any count in a recording of either kind; dense ones have none."""
    if "records" in recorded:
        slots = np.asarray(recorded["last_physical_to_logical_map"]).astype(np.int64)
        experts = int(slots.max()) + 1
        counts = [_logical_counts(record, slots, experts) for record in recorded["records"]]
        total = np.sum(counts, axis=0) if counts else np.zeros(slots.shape)
    else:
        total = np.asarray(recorded["logical_count"])
    return tuple(int(layer) for layer in np.flatnonzero(total.reshape(-1, *total.shape[-2:]).sum((0, 2))))


def _expert_layers(totals: NDArray[Any], layer_ids: Sequence[int] | None) -> tuple[int, ...]:
    if layer_ids is None:
        found = tuple(int(layer) for layer in np.flatnonzero(totals))
        if not found:
            raise PlacementError("a recording of zeros was given; expected tokens; record while requests are served")
        return found
    chosen = tuple(layer_ids)
    if chosen and chosen[-1] >= len(totals):
        raise PlacementError(
            f"a recording of {len(totals)} layers was given for expert layers up to {chosen[-1]}; "
            "expected a row for each layer of the model, dense ones included; the trace is of another model"
        )
    return chosen


def _logical_counts(record: Mapping[str, Any], slots: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    layers = len(slots)
    if "topk_ids_of_layer" in record:
        return count_experts(_logical_experts(record, slots), experts)
    physical = whole_counts(np.asarray(record["global_physical_count"]), "global_physical_count")
    counts = np.zeros((layers, experts), dtype=np.int64)
    np.add.at(counts, (np.arange(layers)[:, None], slots), physical)
    return counts


def _logical_experts(record: Mapping[str, Any], slots: NDArray[np.int64]) -> NDArray[np.int32]:
    physical = np.asarray(record["topk_ids_of_layer"]).astype(np.int64)
    if physical.shape[0] != len(slots) or physical.max(initial=-1) >= slots.shape[1]:
        raise PlacementError(
            f"choices of shape {physical.shape} up to slot {physical.max(initial=-1)} were given with a map of "
            f"{slots.shape}; expected one row a layer and slots of the map"
        )
    layer = np.arange(len(slots))[:, None, None]
    return np.where(physical >= 0, slots[layer, np.maximum(physical, 0)], -1).astype(np.int32)


def _batch(
    record: Mapping[str, Any],
    counts: NDArray[np.int64],
    slots: NDArray[np.int64],
    layers: tuple[int, ...],
    experts: int,
    scenario: str,
) -> Batch:
    phase = _phase(record.get("forward_mode"))
    if "topk_ids_of_layer" not in record:
        return Batch(counts[list(layers)], None, None, phase, scenario)
    chosen = _logical_experts(record, slots)[list(layers)]
    source = np.full(chosen.shape[1], int(record.get("rank", -1)), dtype=np.int32)
    return Batch.of_tokens(chosen, experts, source, phase, scenario)


def _phase(mode: Any) -> str:
    key = mode.lower() if isinstance(mode, str) else int(mode) if mode is not None else None
    return _PHASES.get(key, "mixed") if key is not None else "mixed"
