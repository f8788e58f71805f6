"""What a lowered graph calls of the native kernels: functions of tensors, and how each describes its call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from regraft.codegen.cpu.native import attention, experts, linear, rowwise, tokens
from regraft.codegen.cpu.native.call import NativeCall
from regraft.codegen.cpu.native.kernels import NATIVE

Describe = Callable[..., NativeCall]

#: Function of the lowered graph -> the launcher that describes its call, which takes the library first.
DESCRIPTIONS: dict[Callable[..., Any], Describe] = {}


def _operator(name: str, describe: Describe) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        library: ctypes.CDLL = NATIVE.library()
        return describe(library, *given).run(library)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = describe.__doc__
    DESCRIPTIONS[run] = describe
    return run


linear_native = _operator("linear_native", linear.linear)
attend_native = _operator("attend_native", attention.attend)
norm_native = _operator("norm_native", rowwise.norm)
add_norm_native = _operator("add_norm_native", rowwise.add_norm)
rope_native = _operator("rope_native", rowwise.rope)
silu_glu_native = _operator("silu_glu_native", rowwise.silu_glu)
experts_native = _operator("experts_native", experts.run)
plan_native = _operator("plan_native", tokens.plan)
merge_native = _operator("merge_native", tokens.merge)
log_native = _operator("log_native", tokens.log)
unmerge_native = _operator("unmerge_native", tokens.unmerge)
