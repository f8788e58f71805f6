"""The native kernels of this process, declared and checked. What every model needs is built as soon as regraft is
looked at; what only some need, when one does: a build takes the processor from the compilation beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType

from regraft.codegen.cpu.native import (
    attention,
    batched,
    copy,
    experts,
    fused,
    linear,
    mask,
    panels,
    reversed_attention,
    rowwise,
    tape,
    tokens,
)
from regraft.codegen.cpu.native.library import NativeLibrary


def _check(library: ctypes.CDLL) -> str:
    for part in (attention, linear, mask, panels, rowwise, tape):
        part.declare(library)
    return attention.check(library)


def _declared(*parts: ModuleType) -> Callable[[ctypes.CDLL], str]:
    def check(library: ctypes.CDLL) -> str:
        for part in parts:
            part.declare(library)
        return ""

    return check


NATIVE = NativeLibrary(("product.cpp", "attention.cpp", "mask.cpp", "rowwise.cpp", "linear.cpp", "tape.cpp"), _check)
EXPERTS = NativeLibrary(("experts.cpp",), _declared(experts), NATIVE)
TOKENS = NativeLibrary(("tokens.cpp",), _declared(tokens), NATIVE)
FUSED = NativeLibrary(("fused.cpp", "batched.cpp", "copy.cpp"), _declared(fused, batched, copy), NATIVE)
REVERSED = NativeLibrary(("reversed_attention.cpp",), _declared(reversed_attention), NATIVE)
