"""vLLM's load dump (pull request 41141): JSON lines with ``expert_load`` and ``p2l_map``, both ``[layers, slots]``.

Layers are expert layers in order, without their true ids: pass these where dense layers come before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.readers.stored import whole_trace
from regraft.solvers.placement.trace import Batch, Trace, whole_counts

_META, _STATISTICS = "eplb_load_meta", "eplb_load_stats"


@dataclass(frozen=True)
class VllmTrace:
    """The file as a ``Stored`` trace; each statistics line is a batch, and is read when it is asked for."""

    path: Path
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    #: Where each statistics line begins, in bytes, and its number in the file.
    starts: tuple[tuple[int, int], ...]
    scenario: str = "all"

    @classmethod
    def open(
        cls, path: Path | str, top_k: int, layer_ids: Sequence[int] | None = None, scenario: str = "all"
    ) -> VllmTrace:
        """Find the file's lines; sizes are those of its first. Raises ``PlacementError`` where it has none."""
        path = Path(path)
        with _opened(path) as file:
            starts = tuple(_statistics_lines(file))
            if not starts:
                raise PlacementError(f"{path.name!r} has no {_STATISTICS} line; expected at least one")
            load, slots = _line(file, starts[0], path.name)
        layers = tuple(layer_ids) if layer_ids is not None else tuple(range(len(load)))
        return cls(path, int(slots.max()) + 1, top_k, layers, starts, scenario)

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The scenario of each batch."""
        return (self.scenario,) * len(self.starts)

    @property
    def num_layers(self) -> int:
        """How many expert layers were recorded."""
        return len(self.layers)

    @property
    def size(self) -> int:
        """Bytes of the file, which are more than those of its counts."""
        return self.path.stat().st_size

    def read(self, numbers: Sequence[int]) -> Trace:
        """These batches in this order. Raises ``PlacementError`` for lines of another form."""
        with _opened(self.path) as file:
            batches = tuple(self._batch(file, self.starts[number]) for number in numbers)
        return Trace(self.num_experts, self.top_k, self.layers, batches)

    def transitions(self) -> dict[str, NDArray[np.float64]]:
        """None: only counts are recorded."""
        return {}

    def _batch(self, file: BinaryIO, start: tuple[int, int]) -> Batch:
        load, slots = _line(file, start, self.path.name)
        experts = int(slots.max()) + 1
        if experts != self.num_experts:
            raise PlacementError(
                f"{self.path.name!r}, line {start[1]} places {experts} experts and the first one {self.num_experts}; "
                "expected one model: record again"
            )
        counts = np.zeros((len(load), experts), dtype=np.int64)
        used = slots >= 0
        row = np.broadcast_to(np.arange(len(load))[:, None], slots.shape)
        np.add.at(counts, (row[used], slots[used]), load[used])
        return Batch(counts, scenario=self.scenario)


def read_vllm(path: Path | str, top_k: int, layer_ids: Sequence[int] | None = None, scenario: str = "all") -> Trace:
    """Read the file; each statistics line is a batch. Raises ``PlacementError`` for lines of another form."""
    return whole_trace(VllmTrace.open(path, top_k, layer_ids, scenario))


def _statistics_lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where lines begin that are not blank and do not name themselves headers, and their numbers."""
    start = 0
    for number, text in enumerate(file, 1):
        if text.strip() and f'"{_META}"'.encode() not in text:
            yield start, number
        start += len(text)


def _line(file: BinaryIO, start: tuple[int, int], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Loads and map of a statistics line, ``[layers, slots]`` each."""
    file.seek(start[0])
    where = f"{name!r}, line {start[1]}"
    parsed = json.loads(file.readline().decode("utf-8"))
    line = parsed if isinstance(parsed, dict) else {}
    kind = line.get("record_type")
    if kind != _STATISTICS or "expert_load" not in line or "p2l_map" not in line:
        raise PlacementError(f"{where} is of record_type {kind!r}; expected {_STATISTICS} with expert_load and p2l_map")
    load = whole_counts(_table(line["expert_load"], where), where)
    slots = _table(line["p2l_map"], where)
    if load.ndim != 2 or load.shape != slots.shape or slots.dtype.kind not in "iu" or slots.size == 0:
        raise PlacementError(f"{where} has loads {load.shape} and a map {slots.shape}; expected [layers, slots]")
    return load, slots


def _table(rows: Any, where: str) -> NDArray[Any]:
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise PlacementError(f"{where} has rows of unequal length; expected [layers, slots]") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlacementError(f"{path.name!r} cannot be read as JSON lines: {error}") from error
