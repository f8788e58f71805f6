"""The native kernels of this process: one library, declared and checked."""

from __future__ import annotations

import ctypes

from regraft.codegen.cpu.native import attention, experts, linear, panels, rowwise, tape, tokens
from regraft.codegen.cpu.native.library import NativeLibrary


def _check(library: ctypes.CDLL) -> str:
    for part in (attention, experts, linear, panels, rowwise, tape, tokens):
        part.declare(library)
    return attention.check(library)


NATIVE = NativeLibrary(_check)
