"""Our own trace file, as ``.npz`` or ``.safetensors``: the same arrays under the same names.

``header``: a JSON object as bytes (uint8). Per batch ``b``: ``counts.<b>`` ``[layers, experts]``, and where known
``experts.<b>`` ``[layers, tokens, top_k]`` (-1: no choice) and ``source_rank.<b>`` ``[tokens]``. Per scenario where
known ``transitions.<scenario number>``. A batch whose tokens are known has no counts array: they follow from them.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from regraft.solvers.placement.errors import PlacementError
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


def read_trace(path: Path | str) -> Trace:
    """Read a trace that ``write_trace`` wrote. Raises ``PlacementError`` for anything else."""
    path = Path(path)
    archive = _is_archive(path)
    try:
        if archive:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        else:
            arrays = load_file(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise PlacementError(f"trace file {path.name!r} cannot be read: {error}") from error
    return _unpack(arrays, path.name)


def stream_trace(path: Path | str, batches: int = 64) -> Iterator[Trace]:
    """An ``.npz`` trace in pieces of ``batches`` batches; only one piece is in memory. Errors as ``read_trace``."""
    path = Path(path)
    if not _is_archive(path):
        yield from read_trace(path).chunks(batches)
        return
    try:
        with np.load(path, allow_pickle=False) as file:
            count = len(json.loads(bytes(file["header"]))["batches"])
            for start in range(0, count, batches):
                yield _unpack(file, path.name, range(start, min(start + batches, count)))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, PlacementError):
            raise
        raise PlacementError(f"trace file {path.name!r} cannot be read: {error}") from error


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


def _unpack(arrays: Mapping[str, NDArray[Any]], name: str, numbers: range | None = None) -> Trace:
    try:
        header = json.loads(bytes(arrays["header"]))
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise PlacementError(
                f"{name!r} is {header['format']} version {header['version']}; expected {FORMAT} version {VERSION}"
            )
        chosen = numbers if numbers is not None else range(len(header["batches"]))
        batches = [_batch(arrays, number, header["batches"][number], header, name) for number in chosen]
        scenarios = header["transitions"] if chosen.start == 0 else []
        return Trace(
            header["num_experts"],
            header["top_k"],
            tuple(header["layer_ids"]),
            tuple(batches),
            header["num_hidden_layers"],
            header["model_name"],
            {scenario: arrays[f"transitions.{number}"] for number, scenario in enumerate(scenarios)},
        )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlacementError(
            f"{name!r} is no trace file of this project: {error!r} is missing or malformed; "
            "expected a file written by write_trace; name the reader of its own format"
        ) from error


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
