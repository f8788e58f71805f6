"""Our own trace file, as ``.npz`` or ``.safetensors``: the same arrays under the same names.

``header``: a JSON object as bytes (uint8). Per batch ``b``: ``counts.<b>`` ``[layers, experts]``, and where known
``experts.<b>`` ``[layers, tokens, top_k]`` (-1: no choice) and ``source_rank.<b>`` ``[tokens]``. Per scenario where
known ``transitions.<scenario number>``. A batch whose tokens are known has no counts array: they follow from them.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.readers.stored import whole_trace
from regraft.solvers.placement.trace import Batch, Trace, whole_counts
from regraft.solvers.placement.whole import replacing

FORMAT = "regraft.trace"
VERSION = 1
Arrays = dict[str, NDArray[Any]]


def write_trace(trace: Trace, path: Path | str) -> None:
    """Write a trace; the name's ending, ``.npz`` or ``.safetensors``, chooses the form. The file appears whole."""
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise PlacementError(f"trace file {path.name!r} was named; expected a name ending in .npz or .safetensors")
    arrays = _pack(trace)
    with replacing(path) as partial:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        else:
            save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, partial)


@dataclass(frozen=True)
class NativeTrace:
    """Our own file as a ``Stored`` trace: an array is read when its batch is asked for."""

    path: Path
    scenarios: tuple[str, ...]
    num_layers: int
    size: int

    @classmethod
    def open(cls, path: Path | str) -> NativeTrace:
        """Look into the file. Raises ``PlacementError`` for anything that ``write_trace`` did not write."""
        path = Path(path)
        with _opened(path) as arrays:
            header = _header(arrays, path.name)
            try:
                scenarios = tuple(str(facts["scenario"]) for facts in header["batches"])
                return cls(path, scenarios, len(header["layer_ids"]), _size(path))
            except (KeyError, TypeError) as error:
                raise _malformed(path.name, error) from error

    def read(self, numbers: Sequence[int]) -> Trace:
        """These batches in this order, without transitions."""
        with _opened(self.path) as arrays:
            return _unpack(arrays, self.path.name, numbers)

    def transitions(self) -> dict[str, NDArray[np.float64]]:
        """Transitions that the file holds itself."""
        with _opened(self.path) as arrays:
            names = _header(arrays, self.path.name).get("transitions", [])
            return {scenario: arrays[f"transitions.{number}"] for number, scenario in enumerate(names)}


def read_trace(path: Path | str) -> Trace:
    """Read a trace that ``write_trace`` wrote. Raises ``PlacementError`` for anything else."""
    return whole_trace(NativeTrace.open(path))


class _Tensors(Mapping[str, NDArray[Any]]):
    """The arrays of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, set(file.keys())

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.names:
            raise KeyError(name)
        array: NDArray[Any] = self.file.get_tensor(name)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The file's arrays, read one by one; what is wrong with the file is raised as ``PlacementError``."""
    try:
        if _is_archive(path):
            with np.load(path, allow_pickle=False) as file:
                yield file
        else:
            with safe_open(path, framework="numpy") as file:
                yield _Tensors(file)
    except PlacementError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise PlacementError(f"trace file {path.name!r} cannot be read: {error}") from error


def _size(path: Path) -> int:
    if not _is_archive(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def _is_archive(path: Path) -> bool:
    """Whether the file is an ``.npz``, by its first bytes, whatever its name. Raises ``PlacementError``."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise PlacementError(f"trace file {path.name!r} cannot be read: {error.strerror or error}") from error


def _pack(trace: Trace) -> Arrays:
    arrays: Arrays = {}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "layer_ids": list(trace.layer_ids),
        "num_hidden_layers": trace.num_hidden_layers,
        "model_name": trace.model_name,
        "batches": [{"phase": batch.phase, "scenario": batch.scenario} for batch in trace.batches],
        "transitions": list(trace.transitions),
    }
    for number, batch in enumerate(trace.batches):
        if batch.experts is None:
            arrays[f"counts.{number}"] = batch.counts
        else:
            small = trace.num_experts < 2**15
            arrays[f"experts.{number}"] = batch.experts.astype(np.int16) if small else batch.experts
        if batch.source_rank is not None:
            arrays[f"source_rank.{number}"] = batch.source_rank
    for number, values in enumerate(trace.transitions.values()):
        arrays[f"transitions.{number}"] = values
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    return arrays


def _header(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(bytes(arrays["header"]))
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise PlacementError(
                f"{name!r} is {header['format']} version {header['version']}; expected {FORMAT} version {VERSION}"
            )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _malformed(name, error) from error
    return header


def _unpack(arrays: Mapping[str, NDArray[Any]], name: str, numbers: Sequence[int]) -> Trace:
    header = _header(arrays, name)
    try:
        return Trace(
            header["num_experts"],
            header["top_k"],
            tuple(header["layer_ids"]),
            tuple(_batch(arrays, number, header["batches"][number], header, name) for number in numbers),
            header["num_hidden_layers"],
            header["model_name"],
        )
    except (KeyError, TypeError) as error:
        raise _malformed(name, error) from error


def _malformed(name: str, error: Exception) -> PlacementError:
    return PlacementError(
        f"{name!r} is no trace file of this project: {error!r} is missing or malformed; "
        "expected a file written by write_trace; name the reader of its own format"
    )


def _batch(
    arrays: Mapping[str, NDArray[Any]], number: int, facts: dict[str, str], header: dict[str, Any], name: str
) -> Batch:
    if f"experts.{number}" not in arrays:
        counts = whole_counts(arrays[f"counts.{number}"], f"{name!r}, batch {number}")
        return Batch(counts, None, None, facts["phase"], facts["scenario"])
    source = arrays.get(f"source_rank.{number}")
    return Batch.of_tokens(
        arrays[f"experts.{number}"], header["num_experts"], source, facts["phase"], facts["scenario"]
    )
