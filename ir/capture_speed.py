"""Exporting faster: what ``torch.export`` spends on things that inference capture does not need.

Measured on a 40-layer decoder, CPU seconds of one export: 12.0 as it is, 5.2 with everything below.

- A function mode inside the model's ``forward`` swallows gradient-mode switches and autocast regions that are
  switched off. Export otherwise records each, splits the graph at them and builds one submodule a region, which is
  then inlined again.
- The same mode notes the user's stack at each call by walking the frames that are not torch's; export's own
  symbolisation reads every frame of torch again at each operator.
- ``GraphModule.recompile`` generates code for the whole graph each time a pass touches it, about 30 times; it is
  put off until somebody calls the module.
- The garbage collector, which finds nothing and walks everything, rests meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import linecache
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode

from regraft.ir.capture_state import LAYOUT_QUERIES, Held, ModelState, Notes, replaced_forward

_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
_SET_GRAD = torch._C._set_grad_enabled
_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
# Reading these makes no node, and models read them often.
_QUERIES = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")
)
_LAYOUT_QUERIES = frozenset(getattr(torch.Tensor, name) for name in LAYOUT_QUERIES)

Hint = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def faster_export(model: nn.Module, notes: Notes, hint: Hint = contextlib.nullcontext) -> Iterator[None]:
    """While this context lasts, ``torch.export`` of ``model`` takes the short ways above; ``notes`` gets what the model
    did meanwhile. The model runs inside ``hint()``."""
    with resting_collector(), deferred_codegen(), _watched_forward(model, notes, hint):
        yield


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """No automatic garbage collection inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def deferred_codegen() -> Iterator[None]:
    """Graph modules changed by this thread inside generate their code when they are first called."""
    real = fx.GraphModule.recompile
    owner = threading.get_ident()

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        real(self)
        return type(self).forward(self, *args, **kwargs)

    def recompile(self: fx.GraphModule) -> Any:
        if threading.get_ident() != owner:
            return real(self)
        type(self).forward = forward  # every graph module has a class of its own
        self.__dict__.setdefault("_code", "")
        structure = getattr(self.graph._codegen, "pytree_info", None)
        if structure is not None:
            self._in_spec, self._out_spec = structure.in_spec, structure.out_spec
        return None

    fx.GraphModule.recompile = recompile  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.GraphModule.recompile = real  # type: ignore[method-assign]


@contextlib.contextmanager
def _watched_forward(model: nn.Module, notes: Notes, hint: Hint) -> Iterator[None]:
    if isinstance(model, (fx.GraphModule, torch.jit.ScriptModule)):  # export does not call their ``forward``
        yield
        return
    original = model.forward
    state = ModelState(model)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        held = Held((args, kwargs))
        with hint(), _InferenceMode(forward.__code__, notes):  # type: ignore[attr-defined]
            result = original(*args, **kwargs)
        notes.changed += state.changes()  # here, because export puts attributes back
        notes.inputs_changed |= held.changed()
        return result

    with replaced_forward(model, forward), fx_traceback.preserve_node_meta():
        yield


class _InferenceMode(TorchFunctionMode):
    """Swallows what inference does not need, and notes where in the user's code each operator comes from."""

    def __init__(self, outermost: CodeType, notes: Notes) -> None:
        super().__init__()
        self._outermost = outermost
        self._notes = notes
        self._skipped = object()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _SET_GRAD:
            return None
        if func is _ENTER_AUTOCAST and _is_off(*args):
            return self._skipped
        if func is _EXIT_AUTOCAST and args[0] is self._skipped:
            return None
        if func in _LAYOUT_QUERIES:
            self._notes.layout_read = True
        if func not in _QUERIES and fx_traceback.has_preserved_node_meta():
            fx_traceback.current_meta["stack_trace"] = self._stack()
        return func(*args, **(kwargs or {}))

    def _stack(self) -> str:
        lines: list[str] = []
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not self._outermost:
            line = _frame_text(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
            if line:
                lines.append(line)
            frame = frame.f_back  # type: ignore[assignment]
        return "\n".join(reversed(lines))


@functools.lru_cache(maxsize=1 << 16)
def _frame_text(file: str, line: int, function: str) -> str:
    if file.startswith(_TORCH_FOLDER):
        return ""
    return f'  File "{file}", line {line}, in {function}\n    {linecache.getline(file, line).strip()}'


def _is_off(device: str, dtype: Any = None, enabled: bool = True, *_: Any) -> bool:
    return not enabled and not torch.is_autocast_enabled(device)
