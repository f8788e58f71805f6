"""Names of the functions that a graph calls.

A name is looked up only among the operators of allowed namespaces and in a fixed table of arithmetic on
sizes; nothing is ever imported or resolved as a dotted path.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

import regraft.ir.ops  # noqa: F401  registers torch.ops.regraft
from regraft.artifact.errors import ArtifactError

#: Operator namespaces that any artifact may call.
NAMESPACES = ("aten", "prims", "regraft")

_OPERATOR_FUNCTIONS = (
    "getitem add sub mul floordiv truediv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift invert"
)
_TORCH_FUNCTIONS = "sym_max sym_min sym_float sym_int sym_not sym_ite sym_sum sym_sqrt _sym_sqrt"
_FUNCTIONS: dict[str, Any] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR_FUNCTIONS.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH_FUNCTIONS.split() if hasattr(torch, name)},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
}
_NAMES: dict[Any, str] = {function: name for name, function in _FUNCTIONS.items()}
_CHECKS = ("_assert", "sym_constrain_range")  # the only operators without a result that a pure graph may hold
_OPERATOR = re.compile(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


def encode_target(target: Any) -> str:
    """``namespace::name.overload`` of an operator, or the name of a function in the table."""
    if isinstance(target, OpOverload):
        reason = _impurity(target)
        if not reason:
            return f"{target.namespace}::{target._schema.name.split('::')[1]}.{target._overloadname}"
        raise ArtifactError(f"the operator {target} cannot be saved: it {reason}; canonicalize the program first")
    if isinstance(target, Callable) and target in _NAMES:  # type: ignore[arg-type]
        return _NAMES[target]
    raise ArtifactError(
        f"the function {getattr(target, '__name__', target)} cannot be saved; artifacts store calls of PyTorch "
        "operators and arithmetic on sizes, so capture the model without control flow and higher-order operators"
    )


def namespace_of(name: str) -> str | None:
    """The operator namespace of an encoded target; None for arithmetic on sizes."""
    return name.split("::")[0] if "::" in name else None


def decode_target(name: Any, namespaces: Collection[str]) -> Any:
    """The function called ``name``, when it is one that a graph may call.

    Raises ``ArtifactError`` for any other name, for a namespace that is not allowed, and for an operator
    that writes to its arguments or to a file.
    """
    if isinstance(name, str) and name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if parts is None:
        raise ArtifactError(f"the graph calls {str(name)[:80]!r}, which is not an operator; do not trust this file")
    namespace, operator_name, overload = parts.groups()
    if namespace not in (*NAMESPACES, *namespaces):
        raise ArtifactError(
            f"the graph calls {name}, an operator of the library {namespace!r}; import that library and pass "
            f"namespaces=({namespace!r},) if you trust it"
        )
    packet = getattr(getattr(torch.ops, namespace), operator_name, None)
    found = getattr(packet, overload, None) if isinstance(packet, OpOverloadPacket) else None
    if not isinstance(found, OpOverload):
        raise ArtifactError(
            f"the graph calls {name}, which is not registered in this process (torch {torch.__version__}); import the "
            "library that defines it or install the versions named in manifest.json"
        )
    reason = _impurity(found)
    if reason:
        raise ArtifactError(f"the graph calls {name}, which {reason}; do not trust this file")
    return found


def _impurity(target: OpOverload) -> str:
    """Why an operator has no place in a pure graph; empty when it has."""
    schema = target._schema
    if schema.is_mutable:
        return "writes to its arguments"
    if not schema.returns and not schema.name.split("::")[1].startswith(_CHECKS):
        return "returns nothing"
    if any("file" in argument.name for argument in schema.arguments):
        return "reads or writes files"
    return ""
