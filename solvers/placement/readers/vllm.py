"""vLLM's load dump (pull request 41141): JSON lines with ``expert_load`` and ``p2l_map``, both ``[layers, slots]``.

Layers are expert layers in order, without their true ids: pass these where dense layers come before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.trace import Batch, Trace, whole_counts

_META, _STATISTICS = "eplb_load_meta", "eplb_load_stats"


def read_vllm(path: Path | str, top_k: int, layer_ids: Sequence[int] | None = None, scenario: str = "all") -> Trace:
    """Read the file; each statistics line is a batch. Raises ``PlacementError`` for lines of another form."""
    path = Path(path)
    batches = []
    experts = layers = 0
    for number, line in _lines(path):
        kind = line.get("record_type")
        if kind == _META:
            continue
        if kind != _STATISTICS or "expert_load" not in line or "p2l_map" not in line:
            raise PlacementError(
                f"{path.name!r}, line {number} is of record_type {kind!r}; expected {_STATISTICS} with expert_load "
                "and p2l_map"
            )
        load = whole_counts(_table(line["expert_load"], path.name, number), f"{path.name!r}, line {number}")
        slots = _table(line["p2l_map"], path.name, number)
        if load.ndim != 2 or load.shape != slots.shape:
            raise PlacementError(
                f"{path.name!r}, line {number} has loads {load.shape} and a map {slots.shape}; expected [layers, slots]"
            )
        experts, layers = max(experts, int(slots.max()) + 1), len(load)
        counts = np.zeros((layers, experts), dtype=np.int64)
        used = slots >= 0
        row = np.broadcast_to(np.arange(layers)[:, None], slots.shape)
        np.add.at(counts, (row[used], slots[used]), load[used])
        batches.append(Batch(counts, scenario=scenario))
    if not batches:
        raise PlacementError(f"{path.name!r} has no {_STATISTICS} line; expected at least one")
    return Trace(experts, top_k, tuple(layer_ids) if layer_ids is not None else tuple(range(layers)), tuple(batches))


def _table(rows: Any, name: str, number: int) -> NDArray[Any]:
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise PlacementError(f"{name!r}, line {number} has rows of unequal length; expected [layers, slots]") from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    line = json.loads(text)
                    yield number, line if isinstance(line, dict) else {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlacementError(f"{path.name!r} cannot be read as JSON lines: {error}") from error
