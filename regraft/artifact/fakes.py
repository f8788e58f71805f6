"""The fake value of a node as JSON: element type, device, and sizes and strides, maybe symbolic."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from regraft.artifact.symbols import Symbols, encode, free_symbols
from regraft.artifact.values import decode_value, device_named, dtype_named, encode_value, malformed

_SYMBOLIC: dict[str, Any] = {"symint": torch.SymInt, "symfloat": torch.SymFloat, "symbool": torch.SymBool}


def encode_fake(value: Any) -> Any:
    """A tensor, a symbolic number, or lists and tuples of them; anything else is an ordinary value."""
    if isinstance(value, torch.Tensor):
        return {
            "tensor": [
                str(value.dtype).removeprefix("torch."),
                str(value.device),
                [_size(size) for size in value.shape],
                [_size(stride) for stride in value.stride()],
            ]
        }
    for tag, kind in _SYMBOLIC.items():
        if isinstance(value, kind):
            return {tag: encode(value.node.expr)}
    if isinstance(value, (list, tuple)):
        items = [encode_fake(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    return encode_value(value)


def symbols_of(value: Any) -> set[Any]:
    """Free symbols of a fake value."""
    if isinstance(value, torch.Tensor):
        return symbols_of([*value.shape, *value.stride()])
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return free_symbols(value)
    if isinstance(value, (list, tuple)):
        return set().union(*(symbols_of(item) for item in value))
    return set()


class FakeReader:
    """Inverse of :func:`encode_fake`, in one fake mode over one set of symbols."""

    def __init__(self, symbols: Symbols) -> None:
        self._symbols = symbols
        self.mode = FakeTensorMode(shape_env=symbols.shape_env, allow_non_fake_inputs=True)

    def read(self, data: Any) -> Any:
        """The fake value; raises ``ArtifactError`` for malformed data."""
        if isinstance(data, list):
            return [self.read(item) for item in data]
        if isinstance(data, dict) and len(data) == 1:
            ((tag, content),) = data.items()
            if tag == "tensor":
                return self._tensor(*content)
            if tag == "symint":
                return self._symbols.integer(content)
            if tag == "symfloat":
                return self._symbols.floating(content)
            if tag == "symbool":
                return self._symbols.boolean(content)
            if tag == "tuple":
                return tuple(self.read(item) for item in content)
        return decode_value(data)

    def _tensor(self, dtype: Any, device: Any, sizes: Any, strides: Any) -> torch.Tensor:
        if not isinstance(sizes, list) or not isinstance(strides, list) or len(sizes) != len(strides):
            raise malformed([sizes, strides])
        shape = [self._symbols.integer(size) for size in sizes]
        steps = [self._symbols.integer(stride) for stride in strides]
        with self.mode, self._symbols.shape_env.suppress_guards():
            return torch.empty_strided(shape, steps, dtype=dtype_named(dtype), device=device_named(device))


def _size(size: Any) -> Any:
    return encode(size.node.expr) if isinstance(size, torch.SymInt) else int(size)
