"""``torch.export``'s own modules, without a library that one of them names and no export uses."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

#: Imported by the plots of a partitioner for training: 12 MB, and a tenth of a second of each first compilation.
_UNUSED = "networkx"


class _Later(ModuleType):
    """Stands for a module until somebody uses it. Whoever puts it off gets ``object`` for what annotations name."""

    def __init__(self, name: str, spec: ModuleSpec) -> None:
        super().__init__(name)
        self.__spec__ = spec  # who only asks where it lies gets the answer
        self._owner: int | None = threading.get_ident()

    def __getattr__(self, attribute: str) -> Any:
        if self._owner == threading.get_ident() and attribute != "__path__":  # that asks for a part of it
            if attribute.startswith("__"):
                raise AttributeError(attribute)  # who looks through all modules
            return object
        _forget(self)
        return getattr(importlib.import_module(self.__name__), attribute)


def _forget(module: _Later) -> None:
    """Leave the module's place to the real one."""
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


@contextlib.contextmanager
def put_off(name: str) -> Iterator[None]:
    """Modules that are imported inside, and import ``name``, load it when they use it. One that is loaded stays."""
    spec = None if name in sys.modules else find_spec(name)
    if spec is None:
        yield
        return
    later = sys.modules[name] = _Later(name, spec)
    try:
        yield
    finally:
        later._owner = None
        _forget(later)


def export_trace() -> ModuleType:
    """``torch.export._trace``."""
    with put_off(_UNUSED):
        return importlib.import_module("torch.export._trace")
