"""The native kernels of this process, declared and checked. What every model needs is built as soon as regraft is
looked at; what only some need, when one does: a build takes the processor from the compilation beside it."""

from __future__ import annotations

import ctypes

from regraft.codegen.cpu.native import attention, experts, linear, panels, rowwise, tape, tokens
from regraft.codegen.cpu.native.library import NativeLibrary


def _check(library: ctypes.CDLL) -> str:
    for part in (attention, linear, panels, rowwise, tape):
        part.declare(library)
    return attention.check(library)


def _check_experts(library: ctypes.CDLL) -> str:
    experts.declare(library)
    return ""


def _check_tokens(library: ctypes.CDLL) -> str:
    tokens.declare(library)
    return ""


NATIVE = NativeLibrary(("product.cpp", "attention.cpp", "rowwise.cpp", "linear.cpp", "tape.cpp"), _check)
EXPERTS = NativeLibrary(("experts.cpp",), _check_experts, NATIVE)
TOKENS = NativeLibrary(("tokens.cpp",), _check_tokens, NATIVE)
