"""The safetensors files of a Hugging Face folder: which tensor lies where.

A file is eight bytes (the length of the header), the header (JSON: name -> dtype, shape, data_offsets) and the data.
Only headers are read here.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import SourceError

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000
#: Weights in another form than safetensors.
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.gguf", "tf_model.h5", "flax_model.msgpack")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: ``nbytes`` bytes from ``start`` of the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file. ``head`` is what stands before its data; ``tensors`` are in the order of the data."""

    path: Path
    head: bytes
    tensors: tuple[Stored, ...]


def read_shards(folder: Path) -> list[Shard]:
    """The files of a checkpoint. Raises ``SourceError`` for a missing, truncated or superfluous one."""
    listed = _listed(folder)
    present = {path.name for path in folder.glob("*.safetensors")}
    names = sorted(present if listed is None else set(listed.values()))
    if not names:
        raise SourceError(f"the folder {folder} has no safetensors file; give a Hugging Face checkpoint")
    foreign = [path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)]
    unlisted = sorted(present - set(names)) + sorted(foreign)
    if unlisted:
        raise SourceError(
            f"{unlisted[0]} in {folder} holds weights that are not part of the safetensors checkpoint and would stay "
            "as they are; give a folder without it"
        )
    shards = [read_shard(folder / name) for name in names]
    _check_names(folder, shards, listed)
    return shards


def read_shard(path: Path) -> Shard:
    """The header of one file. Raises ``SourceError`` where the file is missing, truncated or no safetensors file."""
    if not path.is_file():
        raise SourceError(f"the shard {path} does not exist, though the index names it; complete the checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise SourceError(f"{path} is no whole safetensors file ({size} bytes); download or save it again")
        text = file.read(length)
    tensors = _tensors(path, text, 8 + length)
    end = tensors[-1].start + tensors[-1].nbytes if tensors else 8 + length
    if end != size:
        raise SourceError(f"{path} has {size} bytes where its header promises {end}; download or save it again")
    return Shard(path, prefix + text, tensors)


def _tensors(path: Path, text: bytes, base: int) -> tuple[Stored, ...]:
    try:
        header: dict[str, Any] = json.loads(text)
        found = [
            Stored(
                name,
                path,
                str(facts["dtype"]),
                tuple(int(size) for size in facts["shape"]),
                base + int(facts["data_offsets"][0]),
                int(facts["data_offsets"][1]) - int(facts["data_offsets"][0]),
            )
            for name, facts in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise SourceError(
            f"the header of {path} cannot be read ({error!r}); download or save the file again"
        ) from error
    found.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    at = base
    for tensor in found:
        if tensor.start != at or tensor.nbytes < 0 or (math.prod(tensor.shape) == 0) != (tensor.nbytes == 0):
            raise SourceError(f"tensor {tensor.name} of {path} does not lie where it should; save the file again")
        at += tensor.nbytes
    return tuple(found)


def _listed(folder: Path) -> dict[str, str] | None:
    """Tensor -> file by the index; None where there is none."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"the index {path} cannot be read ({error!r}); save the checkpoint again") from error
    strange = next((file for file in plain.values() if Path(file).name != file), None)
    if strange is not None:
        raise SourceError(f"the index {path} names the shard {strange!r}; expected a file in the same folder")
    return plain


def _check_names(folder: Path, shards: list[Shard], listed: dict[str, str] | None) -> None:
    held: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in held:
                raise SourceError(
                    f"tensor {tensor.name} is in {held[tensor.name]} and in {shard.path.name} of {folder}; "
                    "expected it once; remove the files that are not part of the checkpoint"
                )
            held[tensor.name] = shard.path.name
    for name, file in (listed or {}).items():
        if held.get(name) != file:
            raise SourceError(
                f"the index of {folder} places {name} in {file}, which does not hold it; save the checkpoint again"
            )
