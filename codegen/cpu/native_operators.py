"""What a lowered graph calls of the native kernels: functions of tensors, and how each describes its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regraft.codegen.cpu.native import (
    attention,
    batched,
    copy,
    experts,
    fused,
    linear,
    reversed_attention,
    rowwise,
    tokens,
)
from regraft.codegen.cpu.native.call import NativeCall
from regraft.codegen.cpu.native.kernels import EXPERTS, FUSED, NATIVE, REVERSED, TOKENS
from regraft.codegen.cpu.native.library import NativeLibrary

Describe = Callable[..., NativeCall]


@dataclass(frozen=True, eq=False)
class Description:
    """How a call is described: by a launcher, which takes the loaded ``native`` library first."""

    native: NativeLibrary
    launcher: Describe

    def __call__(self, *given: Any, **named: Any) -> NativeCall:
        """The call of ``given``, not yet made."""
        return self.launcher(self.native.library(), *given, **named)


#: Function of the lowered graph -> how its call is described.
DESCRIPTIONS: dict[Callable[..., Any], Description] = {}


def _operator(name: str, launcher: Describe, native: NativeLibrary = NATIVE) -> Callable[..., Any]:
    describe = Description(native, launcher)

    def run(*given: Any) -> Any:
        return describe(*given).run(native.library())

    run.__name__ = run.__qualname__ = name
    run.__doc__ = launcher.__doc__
    DESCRIPTIONS[run] = describe
    return run


linear_native = _operator("linear_native", linear.linear)
attend_native = _operator("attend_native", attention.attend)
lse_native = _operator("lse_native", attention.log_sum_exp)
norm_native = _operator("norm_native", rowwise.norm)
add_norm_native = _operator("add_norm_native", rowwise.add_norm)
rope_native = _operator("rope_native", rowwise.rope)
silu_glu_native = _operator("silu_glu_native", rowwise.silu_glu)
experts_native = _operator("experts_native", experts.run, EXPERTS)
plan_native = _operator("plan_native", tokens.plan, TOKENS)
merge_native = _operator("merge_native", tokens.merge, TOKENS)
log_native = _operator("log_native", tokens.log, TOKENS)
unmerge_native = _operator("unmerge_native", tokens.unmerge, TOKENS)
scan_native = _operator("scan_native", tokens.scan, TOKENS)
fused_native = _operator("fused_native", fused.fused, FUSED)
batched_native = _operator("batched_native", batched.batched, FUSED)
windows_native = _operator("windows_native", batched.windows, FUSED)
reshaped_native = _operator("reshaped_native", copy.reshaped, FUSED)
reversed_native = _operator("reversed_native", reversed_attention.reverse, REVERSED)
