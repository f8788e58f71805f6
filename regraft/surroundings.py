"""What is set around a call and keeps compiled code from running: code is compiled for one state of the process."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from regraft.errors import InputError


def obstacle(device: str, default: torch.dtype | None, modes: bool) -> str:
    """Why the original must run in this state; empty where compiled code may. ``default`` is the default element type
    that code was compiled under, None where it does not matter; ``modes`` is as ``_observer`` takes it."""
    if torch.is_autocast_enabled(device):
        return "autocast is active, and code is compiled for the model's own element types"
    now = torch.get_default_dtype()
    if default is not None and now is not default:
        return f"the default element type is {now}, and code was compiled under {default}"
    watched = _observer(modes)
    return f"{watched}, and sees no operators in compiled code" if watched else ""


def _observer(modes: bool) -> str:
    """What follows the operators of this call one by one, in words: native kernels write memory that only they see.

    Compiled code would be a gap to it: a trace of ``torch.jit`` holds tensors that nobody writes, the tensors of
    ``torch.func`` and of dispatch modes have no memory to hand to a kernel, and tangents would end in it. Most modes
    only look on: without ``modes`` they do not count.
    """
    if torch._C._get_tracing_state() is not None:
        return "torch.jit records this call"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        return "a level of forward-mode differentiation is open"
    if modes and torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    return ""


def refuse_export() -> None:
    """Raises ``InputError`` under torch.export: a compiled module's weights are not its own, and would end as
    constants."""
    if torch.compiler.is_exporting():
        raise InputError("torch.export traces a compiled model; export the original, it is in its attribute `original`")


def has_modes(model: object) -> bool:
    """Whether training mode may change what a model computes; a graph that calls no modules computes what it was traced
    with."""
    return not isinstance(model, torch.fx.GraphModule) or any(node.op == "call_module" for node in model.graph.nodes)
