"""Arguments of calls as JSON with a tag for each type.

None, bool, int, finite floats, strings and lists stand for themselves; everything else is an object with one
key, its type. Reading builds only the types of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from regraft.artifact.errors import ArtifactError

_NAMED: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode_value(value: Any) -> Any:
    """A value as JSON; raises ``ArtifactError`` for a type that artifacts do not store."""
    if value is None or isinstance(value, str) or type(value) in (bool, int):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode_value(item) for item in value]}
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode_value(key), encode_value(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode_value(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _NAMED.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise ArtifactError(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be saved; artifacts store "
        "numbers, strings, lists, tuples, dicts, slices and PyTorch's element types, devices and layouts"
    )


def decode_value(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """Inverse of :func:`encode_value`; ``nodes`` are those that the value may refer to."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode_value(item, nodes) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        ((tag, content),) = data.items()
        if tag == "node" and nodes is not None and isinstance(content, str) and content in nodes:
            return nodes[content]
        reader = _READERS.get(tag)
        if reader is not None:
            return reader(content, nodes)
    raise malformed(data)


def malformed(data: Any) -> ArtifactError:
    """The error for JSON that this regraft would not have written."""
    return ArtifactError(f"the graph holds a malformed value ({str(data)[:80]}); save the model again")


def dtype_named(name: Any) -> torch.dtype:
    """The element type called ``name``; raises ``ArtifactError`` when there is none."""
    return _torch_value(name, torch.dtype)  # type: ignore[no-any-return]


def device_named(name: Any) -> torch.device:
    """The device called ``name``; raises ``ArtifactError`` when there is none."""
    try:
        return torch.device(str(name))
    except RuntimeError as error:
        raise malformed(name) from error


def _torch_value(name: Any, kind: type) -> Any:
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, kind):
        raise malformed(name)
    return value


def _pairs(content: Any, nodes: Mapping[str, fx.Node] | None) -> dict[Any, Any]:
    return {decode_value(key, nodes): decode_value(item, nodes) for key, item in content}


def _complex(content: Any, nodes: Mapping[str, fx.Node] | None) -> complex:
    real, imaginary = content
    return complex(float.fromhex(real), float.fromhex(imaginary))


def _slice(content: Any, nodes: Mapping[str, fx.Node] | None) -> slice:
    start, stop, step = (decode_value(part, nodes) for part in content)
    return slice(start, stop, step)


def _float(content: Any, nodes: Mapping[str, fx.Node] | None) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise malformed(content)
    return float(content)


_READERS: dict[str, Callable[[Any, Mapping[str, fx.Node] | None], Any]] = {
    "tuple": lambda content, nodes: tuple(decode_value(item, nodes) for item in content),
    "dict": _pairs,
    "slice": _slice,
    "complex": _complex,
    "float": _float,
    "device": lambda content, nodes: device_named(content),
    "dtype": lambda content, nodes: dtype_named(content),
    "layout": lambda content, nodes: _torch_value(content, torch.layout),
    "memory_format": lambda content, nodes: _torch_value(content, torch.memory_format),
}
