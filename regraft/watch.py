"""Noticing cheaply that a module is no longer the one that was compiled: its weights, its attributes, its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_version = attrgetter("_version")
_address = Tensor.data_ptr
#: Attributes of every module that are compared by what they hold, or that play no part in a forward.
_BOOKS = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}
#: What ``torch.compile`` writes on a module that it wraps.
_MARKS = frozenset({"_is_torch_compile"})


class WeightWatch:
    """Remembers each weight's identity, memory, version and one element, and each part's attributes; reading them all
    is a few C-level loops.

    ``module`` gives parameters, buffers and attributes, ``others`` are further tensors (constants). A tensor in
    ``mutated`` may be written to: the compiled code reads it anew at each call. Versions count what PyTorch itself
    writes; tensors made in inference mode have none, and ``weight.data`` does not count. The element in the middle
    of each weight shows those changes where they are to the whole of it.
    """

    def __init__(self, module: nn.Module | None, others: Iterable[Tensor] = (), mutated: Iterable[Tensor] = ()) -> None:
        parts = list(module.modules()) if module is not None else []
        self._attributes = [part.__dict__ for part in parts]
        self._attributes += _configurations(self._attributes)
        self._holders = [held for part in parts for held in (part._parameters, part._buffers) if held]
        inner = [held for part in parts for held in (part._modules, part._forward_hooks, part._forward_pre_hooks)]
        self._inner, self._empty = [held for held in inner if held], [held for held in inner if not held]
        self._known_attributes = [dict(held) for held in self._attributes]
        self._known_inner = [dict(held) for held in self._inner]
        self._lengths = list(map(len, self._attributes))
        self._read = [_reader(held) for held in self._attributes]
        self._known_values = self._values()
        self._known = [dict(held) for held in self._holders]
        held = [value for values in self._known for value in values.values() if value is not None]
        self._single = [
            (holder, name, value)
            for holder in self._holders
            for name, value in holder.items()
            if value is not None and value.numel() == 1
        ]
        plain = [value for values in self._known_attributes for value in values.values() if isinstance(value, Tensor)]
        free = {id(tensor) for tensor in mutated}
        every = {id(tensor): tensor for tensor in (*held, *plain, *others)}
        self._tensors = [tensor for tensor in every.values() if _has_address(tensor)]
        self._versioned = [t for key, t in every.items() if key not in free and not t.is_inference()]
        self._addresses = list(map(_address, self._tensors))
        self._versions = list(map(_version, self._versioned))
        self._samples = _Samples([tensor for tensor in self._tensors if id(tensor) not in free])
        self._sampled = self._samples.read()

    def changed(self) -> str:
        """Empty while nothing changed, else what did."""
        if any(self._empty) or _differ(self._inner, self._known_inner):
            return "a part of the model or a hook was added, replaced or removed"
        if self._replaced():
            return "a parameter or buffer was replaced or removed"
        if self._attribute_changed():
            return f"the model's attribute {self._which()} was changed"
        if list(map(_version, self._versioned)) != self._versions:
            return "a weight was changed in place"
        if list(map(_address, self._tensors)) != self._addresses:
            return "a weight's data was moved or replaced"
        if self._samples.read() != self._sampled:  # where they lie is known: it was just compared
            return "a weight's data was changed in place"
        return ""

    def _replaced(self) -> bool:
        """Comparing dicts compares identities first. Tensors that differ are compared by value: more than one
        element has no truth value, which raises, and single ones are looked at here."""
        return _differ(self._holders, self._known) or not all(h[name] is value for h, name, value in self._single)

    def _attribute_changed(self) -> bool:
        lengths = list(map(len, self._attributes))
        if lengths != self._lengths:
            both = zip(self._attributes, self._known_attributes, strict=True)
            if any((now.keys() ^ before.keys()) - _MARKS for now, before in both):
                return True
            self._lengths = lengths
        try:
            return _differ(self._values(), self._known_values)
        except KeyError:  # one was removed, and another one added
            return True

    def _values(self) -> list[Any]:
        return [read(held) for read, held in zip(self._read, self._attributes, strict=True)]

    def _which(self) -> str:
        for now, before in zip(self._attributes, self._known_attributes, strict=True):
            for name in (now.keys() | before.keys()) - _MARKS:
                if name not in now or name not in before or _differ(now[name], before[name]):
                    return repr(name)
        return "(unknown)"


def _reader(attributes: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Reads the attributes that can change what a forward computes: most of a module's are PyTorch's own books."""
    names = [name for name in attributes if name not in _BOOKS | _MARKS]
    return _reader_of(*names) if names else lambda held: None


@functools.cache
def _reader_of(*names: str) -> Callable[[dict[str, Any]], Any]:
    """One for all parts of a kind: between two calls a model's weights drive from the caches whatever is read here."""
    return itemgetter(*names)


def _differ(left: Any, right: Any) -> bool:
    """Whether two values differ; what cannot be compared does, unless it is the same object."""
    try:
        return bool(left != right)
    except Exception:  # comparing is the business of the user's classes
        return left is not right


def _configurations(attributes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The attributes of plain objects that parts hold, each once: a model reads its ``config`` when it runs."""
    held = {id(value): value for values in attributes for value in values.values() if _is_configuration(value)}
    return [value.__dict__ for value in held.values()]


def _is_configuration(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict) and not (
        callable(value)
        or isinstance(value, (Tensor, ModuleType, dict, list, set, tuple))
        or type(value).__module__.partition(".")[0] == "torch"
    )


class _Samples:
    """The bytes of one element of each tensor, in its middle, read where they lie, all at once. Views of them would be
    objects of their own, which a model's weights drive from the caches between two calls."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        held = [tensor for tensor in tensors if tensor.numel() and tensor.device.type == "cpu"]
        places = [_middle(tensor) + byte for tensor in held for byte in range(tensor.element_size())]
        first = min(places, default=0)
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (max(places, default=0) - first + 1 if places else 0,),
            "data": (first, True),  # memory from the first to the last; what lies between is never read
        }
        self._memory = np.asarray(self)
        self._places = np.array([place - first for place in places], dtype=np.int64)

    def read(self) -> bytes:
        """What the elements hold now; the tensors must still lie where they did."""
        return self._memory.take(self._places).tobytes()


def _middle(tensor: Tensor) -> int:
    """The address of the element in the middle of each dim."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr() + sum(size // 2 * stride for size, stride in steps) * tensor.element_size()


def _has_address(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_mkldnn
