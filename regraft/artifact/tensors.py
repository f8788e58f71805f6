"""Tensors in the safetensors format, written and read as streams without a second copy of them all.

Format: eight bytes with the length of the header (little endian), the header in JSON (name -> element type,
shape, offsets), the data. The files read and write with the ``safetensors`` package too.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from regraft.artifact.container import CheckedStream, Writer
from regraft.artifact.errors import ArtifactError, brief
from regraft.artifact.manifest import dump_json, parse_json

_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the safetensors format's own limit


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise ``ArtifactError`` for a tensor whose bytes cannot be stored."""
    if is_traceable_wrapper_subclass(tensor):
        reason = f"is a {type(tensor).__name__}; turn it into a plain tensor"
    elif tensor.layout != torch.strided:
        reason = f"has the layout {tensor.layout}; turn it into a dense tensor"
    elif tensor.is_quantized or tensor.dtype not in _DTYPES:
        reason = f"has the element type {tensor.dtype}; convert it to one of {', '.join(map(str, _DTYPES))}"
    elif tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
        reason = "has no data; load the model's weights before saving"
    else:
        return
    raise ArtifactError(f"tensor {name!r} cannot be saved: it {reason}")


def write_tensors(writer: Writer, member: str, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` in the order of their names; at most one is copied at a time."""
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        check_storable(name, tensor)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = dump_json(header)
    text += b" " * (-len(text) % 8)
    writer.add(member, 8 + len(text) + offset, _chunks(text, tensors))


def _chunks(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    for name in sorted(tensors):
        data = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()
        if data.numel():
            yield memoryview(_bytes_of(data))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_tensors(stream: CheckedStream, member: str) -> dict[str, Tensor]:
    """Every tensor of a member, each read once into memory of its own; ``ArtifactError`` when malformed."""
    try:
        header = _header(stream, member)
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda e: (e[3], e[4]))
    except (KeyError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{member} has a malformed header ({brief(error)}); save the model again") from error
    position = 0
    for name, _dtype, _shape, start, end in entries:
        if start != position:
            raise ArtifactError(f"{member} has gaps or overlaps at tensor {name!r}; save the model again")
        position = end
    if position != stream.left:
        raise ArtifactError(f"{member} holds {stream.left} bytes of data and describes {position}; save it again")
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape, _start, _end in entries:
        tensors[name] = _allocate(name, shape, dtype)
        if tensors[name].numel():
            stream.read_into(memoryview(_bytes_of(tensors[name])))
    return tensors


def _allocate(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except (
        RuntimeError,
        TypeError,
        OverflowError,
    ) as error:  # sizes beside a zero that overflow, or no memory
        raise ArtifactError(f"tensor {name!r} of shape {shape} cannot be held in memory; free some") from error


def _header(stream: CheckedStream, member: str) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > min(stream.left, _HEADER_LIMIT):
        raise ArtifactError(f"{member} claims a header of {length} bytes; the file is damaged, copy it again")
    header = parse_json(stream.read(length), member)
    if not isinstance(header, dict):
        raise ArtifactError(f"{member} has a header that is not an object; save the model again")
    header.pop("__metadata__", None)
    return header


def _entry(name: str, entry: Any) -> tuple[str, torch.dtype, list[int], int, int]:
    dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
    start, end = entry["data_offsets"]
    numbers = [start, end, *shape]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"tensor {name!r} has a shape or offsets that are not counts")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} has {end - start} bytes for shape {shape} of {dtype}")
    return name, dtype, shape, start, end
