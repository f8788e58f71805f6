"""Who records or transforms the operators of a call: native kernels write memory that only they see."""

from __future__ import annotations

import torch


def observer(modes: bool) -> str:
    """What follows the operators of this call one by one, in words; empty where nothing does.

    Compiled code would be a gap to it: a trace of ``torch.jit`` holds tensors that nobody writes, and the tensors of
    ``torch.func`` and of dispatch modes have no memory to hand to a kernel. Most modes only look on: without ``modes``
    they do not count.
    """
    if torch._C._get_tracing_state() is not None:
        return "torch.jit records this call"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func is at work"
    if modes and torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    return ""
