"""TensorRT-LLM's statistics folder: ``meta_info.json`` and ``rank<r>.safetensors``, keys ``<iteration>_<layer>``.

Counts are ``[experts]`` per rank and are summed over ranks. ``rank<r>_raw.safetensors``, where it lies there, holds
the chosen experts ``[tokens, top_k]`` under the same keys; the rank is then the tokens' source. Layers are true ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.readers.stored import whole_trace
from regraft.solvers.placement.trace import Batch, Trace, whole_counts

_RANK_FILE = re.compile(r"rank(\d+)(_raw)?\.safetensors")
#: (iteration, layer) -> what a rank recorded.
Records = dict[tuple[int, int], NDArray[np.generic]]


@dataclass(frozen=True)
class TensorRtTrace:
    """The folder as a ``Stored`` trace; a batch is an iteration, and tensors are read when it is asked for."""

    folder: Path
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    iterations: tuple[int, ...]
    #: The file of each rank, and whether these hold choices of tokens rather than counts.
    files: tuple[tuple[int, str], ...]
    raw: bool
    scenario: str = "all"

    @classmethod
    def open(cls, folder: Path | str, scenario: str = "all") -> TensorRtTrace:
        """Look into the folder. Raises ``PlacementError`` for missing files, or layers missing in an iteration."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta_info.json").read_text(encoding="utf-8"))
            experts, top_k = int(meta["num_experts"]), int(meta["num_experts_per_token"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise PlacementError(
                f"{folder.name!r} has no readable meta_info.json with num_experts and num_experts_per_token: {error!r}"
            ) from error
        files, raw = _rank_files(folder)
        keys = {key for _, name in files for key in _keys(folder / name)}
        if not keys:
            raise PlacementError(f"{folder.name!r} has no rank<r>.safetensors with records; expected one file a rank")
        layers = tuple(sorted({layer for _, layer in keys}))
        iterations = tuple(sorted({iteration for iteration, _ in keys}))
        missing = [(i, layer) for i in iterations for layer in layers if (i, layer) not in keys]
        if missing:
            raise PlacementError(
                f"layer {missing[0][1]} is missing in iteration {missing[0][0]}; expected every layer in each; "
                "record again"
            )
        return cls(folder, experts, top_k, layers, iterations, files, raw, scenario)

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The scenario of each iteration."""
        return (self.scenario,) * len(self.iterations)

    @property
    def num_layers(self) -> int:
        """How many expert layers were recorded."""
        return len(self.layers)

    @property
    def size(self) -> int:
        """Bytes of all ranks' files."""
        return sum((self.folder / name).stat().st_size for _, name in self.files)

    def read(self, numbers: Sequence[int]) -> Trace:
        """These iterations in this order."""
        chosen = [self.iterations[number] for number in numbers]
        records = {rank: _records(self.folder / name, chosen, self.layers) for rank, name in self.files}
        make = _of_tokens if self.raw else _of_counts
        batches = tuple(make(records, i, self.layers, self.num_experts, self.scenario) for i in chosen)
        return Trace(self.num_experts, self.top_k, self.layers, batches)

    def transitions(self) -> dict[str, NDArray[np.float64]]:
        """None: they follow from the tokens, where these were recorded."""
        return {}


def read_tensorrt_llm(folder: Path | str, scenario: str = "all") -> Trace:
    """Read the folder. Raises ``PlacementError`` for missing files, or layers missing in an iteration."""
    return whole_trace(TensorRtTrace.open(folder, scenario))


def _rank_files(folder: Path) -> tuple[tuple[tuple[int, str], ...], bool]:
    """Ranks and names of the files with choices, where there are any, and of those with counts else."""
    counts: list[tuple[int, str]] = []
    raw: list[tuple[int, str]] = []
    for path in sorted(folder.iterdir()):
        match = _RANK_FILE.fullmatch(path.name)
        if match:
            (raw if match[2] else counts).append((int(match[1]), path.name))
    return tuple(raw or counts), bool(raw)


def _keys(path: Path) -> Iterator[tuple[int, int]]:
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            if not re.fullmatch(r"\d+_\d+", key):
                raise PlacementError(f"{path.name!r} has a key {key!r}; expected <iteration>_<layer>")
            iteration, layer = key.split("_")
            yield int(iteration), int(layer)


def _records(path: Path, iterations: Sequence[int], layers: tuple[int, ...]) -> Records:
    with _opened(path) as file:
        there = set(file.keys())
        wanted = [(iteration, layer) for iteration in iterations for layer in layers]
        return {key: file.get_tensor("{}_{}".format(*key)) for key in wanted if "{}_{}".format(*key) in there}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise PlacementError(f"{path.name!r} cannot be read: {error}; copy it again") from error


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
