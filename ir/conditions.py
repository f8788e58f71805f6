"""What a program asks of its symbolic sizes beside their ranges: that one is even, or larger than another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]

from regraft.ir.program import Program


def conditions_of(program: Program) -> list[Any]:
    """Conditions (sympy) that must hold for the program to compute what the model does: those that its branches met
    while it was captured, and those that a saved program brought along."""
    shape_env = getattr(program.fake_mode, "shape_env", None)
    settled = dict(getattr(shape_env, "replacements", {}))
    guards = (_settle(guard.expr, settled) for guard in getattr(shape_env, "guards", ()))
    return [condition for condition in dict.fromkeys((*program.conditions, *guards)) if condition != sympy.true]


def _settle(condition: Any, settled: Mapping[Any, Any]) -> Any:
    """``condition`` in the symbols that are left: export replaces one that equals a number or another symbol."""
    for _ in range(len(settled)):
        replaced = condition.xreplace(dict(settled))
        if replaced == condition:
            break
        condition = replaced
    return condition
