"""TensorRT-LLM's statistics folder: ``meta_info.json`` and ``rank<r>.safetensors``, keys ``<iteration>_<layer>``.

Counts are ``[experts]`` per rank and are summed over ranks. ``rank<r>_raw.safetensors``, where it lies there, holds
the chosen experts ``[tokens, top_k]`` under the same keys; the rank is then the tokens' source. Layers are true ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.trace import Batch, Trace, whole_counts

_RANK_FILE = re.compile(r"rank(\d+)(_raw)?\.safetensors")
#: (iteration, layer) -> what a rank recorded.
Records = dict[tuple[int, int], NDArray[np.generic]]


def read_tensorrt_llm(folder: Path | str, scenario: str = "all") -> Trace:
    """Read the folder. Raises ``PlacementError`` for missing files, or layers missing in an iteration."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta_info.json").read_text(encoding="utf-8"))
        experts, top_k = int(meta["num_experts"]), int(meta["num_experts_per_token"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise PlacementError(
            f"{folder.name!r} has no readable meta_info.json with num_experts and num_experts_per_token: {error!r}"
        ) from error
    counts, raw = _rank_files(folder)
    records = raw or counts
    keys = sorted({key for rank in records.values() for key in rank})
    if not keys:
        raise PlacementError(f"{folder.name!r} has no rank<r>.safetensors with records; expected one file a rank")
    layers = tuple(sorted({layer for _, layer in keys}))
    iterations = sorted({iteration for iteration, _ in keys})
    missing = [(i, layer) for i in iterations for layer in layers if (i, layer) not in set(keys)]
    if missing:
        raise PlacementError(
            f"layer {missing[0][1]} is missing in iteration {missing[0][0]}; expected every layer in each; record again"
        )
    make = _of_tokens if raw else _of_counts
    batches = tuple(make(records, iteration, layers, experts, scenario) for iteration in iterations)
    return Trace(experts, top_k, layers, batches)


def _rank_files(folder: Path) -> tuple[dict[int, Records], dict[int, Records]]:
    counts: dict[int, Records] = {}
    raw: dict[int, Records] = {}
    for path in sorted(folder.iterdir()):
        match = _RANK_FILE.fullmatch(path.name)
        if match:
            try:
                found = dict(_parse(load_file(path), path.name))
            except (OSError, SafetensorError) as error:
                raise PlacementError(f"{path.name!r} cannot be read: {error}; copy it again") from error
            (raw if match[2] else counts)[int(match[1])] = found
    return counts, raw


def _parse(tensors: dict[str, NDArray[np.generic]], name: str) -> Iterator[tuple[tuple[int, int], NDArray[np.generic]]]:
    for key, value in tensors.items():
        if not re.fullmatch(r"\d+_\d+", key):
            raise PlacementError(f"{name!r} has a key {key!r}; expected <iteration>_<layer>")
        iteration, layer = key.split("_")
        yield (int(iteration), int(layer)), value


def _of_counts(
    records: dict[int, Records], iteration: int, layers: tuple[int, ...], experts: int, scenario: str
) -> Batch:
    total = np.zeros((len(layers), experts), dtype=np.int64)
    for rank, own in records.items():
        for row, layer in enumerate(layers):
            counts = own.get((iteration, layer))
            if counts is None:
                continue
            if counts.shape != (experts,):
                raise PlacementError(
                    f"rank {rank}, layer {layer} has counts of shape {counts.shape}; expected {experts} experts"
                )
            total[row] += whole_counts(counts, f"rank {rank}, layer {layer}")
    return Batch(total, scenario=scenario)


def _of_tokens(
    records: dict[int, Records], iteration: int, layers: tuple[int, ...], experts: int, scenario: str
) -> Batch:
    chosen, sources = [], []
    for rank, own in sorted(records.items()):
        rows = [own[iteration, layer] for layer in layers if (iteration, layer) in own]
        if not rows:
            continue
        if len(rows) != len(layers) or len({row.shape for row in rows}) > 1:
            raise PlacementError(f"rank {rank} has not every layer of iteration {iteration}, or of unequal tokens")
        chosen.append(np.stack(rows).astype(np.int32))
        sources.append(np.full(rows[0].shape[0], rank, dtype=np.int32))
    return Batch.of_tokens(np.concatenate(chosen, axis=1), experts, np.concatenate(sources), scenario=scenario)
