"""Running emitted files: a module from a text, once a name, without a file on disk."""

from __future__ import annotations

import linecache
import sys
from types import ModuleType

from regraft.codegen.triton.emit import Kernel

_LOADED: dict[str, ModuleType] = {}


def load_kernel(kernel: Kernel) -> ModuleType:
    """The module of an emitted file; its operator is ``torch.ops.regraft_kernels.<name>``.

    Triton and tracebacks read the text through ``linecache``. Kernels of one name differ at most in the sites that
    their heads list, so the first one loaded serves all.
    """
    if kernel.name not in _LOADED:
        _LOADED[kernel.name] = load_source(kernel.name, kernel.source)
    return _LOADED[kernel.name]


def load_source(name: str, source: str) -> ModuleType:
    """A module from a text that regraft emitted."""
    place = f"<regraft kernel {name}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    module = ModuleType(f"regraft_kernels.{name}")
    sys.modules[module.__name__] = module
    exec(compile(source, place, "exec"), module.__dict__)
    return module
