"""Lowering attention to the CPU: the native kernel or PyTorch's, whichever is measured to be faster for a site."""

from __future__ import annotations

from torch import fx

from regraft.codegen.cpu.attention_native import lower_native, measurable, native_can, sample_runs, shape_of
from regraft.codegen.cpu.attention_sdpa import lower_reference, lower_sdpa, sdpa_can
from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir.nodes import arguments


def lower_attention(context: Context, node: fx.Node, tuner: Tuner) -> fx.Node:
    """Emit one attention site; what neither kernel can express runs the definition, and what cannot be measured the
    native kernel."""
    given = arguments(node)
    native, sdpa = native_can(given), sdpa_can(given)
    if native and sdpa and measurable(given):
        form = shape_of(given)
        native = tuner.choose_attention(form, lambda: sample_runs(given, form)) == "native"
    if native:
        return lower_native(context, given)
    return lower_sdpa(context, given) if sdpa else lower_reference(context, given)
