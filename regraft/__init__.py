"""regraft: a graph-rewriting compiler for PyTorch inference.

Names are imported when first used: torch is slow to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.api import compile, load
    from regraft.compiled import CompiledModule
    from regraft.errors import (
        ArtifactError,
        CaptureError,
        InputError,
        OptionError,
        RegraftError,
        SourceError,
        TargetError,
    )
    from regraft.ir.copies import count_copies
    from regraft.passes.budget.budget import Budget
    from regraft.passes.budget.errors import BudgetError
    from regraft.passes.experts.sharding import Sharding

__version__ = "0.1.0"
_HOME = {
    "compile": "api",
    "load": "api",
    "Budget": "passes.budget.budget",
    "BudgetError": "passes.budget.errors",
    "CompiledModule": "compiled",
    "Sharding": "passes.experts.sharding",
    "count_copies": "ir.copies",
}
__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "CaptureError",
    "CompiledModule",
    "InputError",
    "OptionError",
    "RegraftError",
    "Sharding",
    "SourceError",
    "TargetError",
    "__version__",
    "compile",
    "count_copies",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    if _HOME.get(name) == "api":
        _begin()
    return getattr(import_module(f"regraft.{_HOME.get(name, 'errors')}"), name)


def _begin() -> None:
    """Whoever takes ``compile`` or ``load`` is about to want both: the kernels, whose first build on a machine takes a
    second, and the modules, whose loading takes half of one (less while Python looks for no cycles)."""
    from regraft.codegen.cpu.native.kernels import NATIVE
    from regraft.ir.memory import no_cycle_search

    NATIVE.start()
    with no_cycle_search():
        import_module("regraft.api")
