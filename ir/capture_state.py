"""Plain attributes that a model's ``forward`` sets: capture must leave them alone, and compiled code does not set them.

``torch.export`` runs ``forward`` once, on fake tensors, so a counter that it increments would be frozen into the graph,
and a size that it notes would be left behind as a symbol.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from regraft.ir.capture_error import CaptureError

#: Methods of a tensor that tell about its memory: a graph made by asking them is that of the example's strides.
LAYOUT_QUERIES = ("stride", "is_contiguous", "storage_offset", "data_ptr", "untyped_storage", "storage", "dim_order")
_OWN = frozenset(nn.Module().__dict__)  # what every module has: parameters, buffers, parts and hooks


@dataclass
class Notes:
    """What one run of ``forward`` under export did beside computing: ``layout_read`` says that it asked for strides or
    contiguity, ``changed`` names the attributes that it set to something new, ``inputs_changed`` says that a list, a
    dict or another container among the inputs holds something else than before."""

    layout_read: bool = False
    changed: list[str] = field(default_factory=list)
    inputs_changed: bool = False


class ModelState:
    """The plain attributes of a model's parts, as they are now; lists, dicts and sets by what they hold."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(name, part.__dict__) for name, part in model.named_modules()]
        self._known = [{key: _snapshot(held[key]) for key in _plain(held)} for _, held in self._held]

    def changes(self) -> list[str]:
        """Dotted names of the attributes that are no longer what they were."""
        found: list[str] = []
        for (name, held), known in zip(self._held, self._known, strict=True):
            for key in sorted({*_plain(held), *known}):
                if key not in known or key not in held or _changed(held[key], *known[key]):
                    found.append(f"{name}.{key}" if name else key)
        return found

    def restore(self) -> None:
        """Put every attribute back."""
        for (_, held), known in zip(self._held, self._known, strict=True):
            for key in [key for key in _plain(held) if key not in known]:
                del held[key]
            for key, (value, items) in known.items():
                held[key] = value
                if items is not None and not _equal(value, items):
                    _refill(value, items)


class Held:
    """What a call's inputs hold: containers, and tensors and scalars by identity."""

    def __init__(self, inputs: Any) -> None:
        self._inputs = inputs
        self._leaves, self._structure = tree_flatten(inputs)

    def changed(self) -> bool:
        """Whether a container among the inputs holds something else now."""
        leaves, structure = tree_flatten(self._inputs)
        same = structure == self._structure and all(map(operator.is_, leaves, self._leaves))
        return not same


@contextlib.contextmanager
def replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``forward`` is the model's; one that its instance had of its own comes back."""
    own = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def reads_layout(module: fx.GraphModule) -> bool:
    """Whether a graph that the user traced asks for the strides or the contiguity of a tensor."""
    return any(node.op == "call_method" and node.target in LAYOUT_QUERIES for node in module.graph.nodes)


def settle(model: nn.Module, run: Callable[[], Any]) -> None:
    """Bring a model whose ``forward`` sets attributes to where it stays; ``run()`` calls it on the example inputs.

    Raises ``CaptureError`` when a second call changes them again: such a model counts calls, and its graph would be
    that of one call.
    """
    run()
    once = ModelState(model)
    run()
    changed = once.changes()
    once.restore()
    if changed:
        raise CaptureError(
            f"{type(model).__name__}.forward changes the attribute {changed[0]} at each call, which compiled code does "
            "not; make it a buffer, or leave it out of forward"
        )


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _plain(held: dict[str, Any]) -> list[str]:
    return [key for key in held if key not in _OWN and key != "forward"]


def _snapshot(value: Any) -> tuple[Any, Any]:
    """The value, and a copy of what it holds where it is a container."""
    return value, type(value)(value) if type(value) in (list, dict, set) else None


def _changed(now: Any, value: Any, items: Any) -> bool:
    return (now is not value and not _equal(now, value)) or (items is not None and not _equal(value, items))


def _refill(value: Any, items: Any) -> None:
    if isinstance(value, list):
        value[:] = items
    else:
        value.clear()
        value.update(items)


def _equal(left: Any, right: Any) -> bool:
    if left is right:
        return True  # also where comparing gives no answer: tensors, and weak references to them
    if isinstance(left, _SYMBOLIC) or isinstance(right, _SYMBOLIC):
        return False  # comparing would put a guard on a symbol
    if isinstance(left, (tuple, list)) and type(left) is type(right):
        return len(left) == len(right) and all(map(_equal, left, right))
    try:
        return bool(left == right)
    except Exception:  # comparing is the business of the user's classes
        return False
