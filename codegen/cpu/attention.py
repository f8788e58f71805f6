"""Lowering attention to the CPU: the native kernel or PyTorch's, whichever is measured to be faster for a site."""

from __future__ import annotations

from torch import fx

from regraft.codegen.cpu.attention_blocks import blocks_can, lower_blocks
from regraft.codegen.cpu.attention_measured import measurable, sample, shape_of
from regraft.codegen.cpu.attention_native import lower_native, lower_native_map, native_can, native_can_map
from regraft.codegen.cpu.attention_sdpa import has_flag, lower_reference, lower_sdpa, sdpa_can
from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir.nodes import arguments


def lower_attention(context: Context, node: fx.Node, tuner: Tuner) -> fx.Node:
    """Emit one attention site; what cannot be measured runs the native kernel. What that cannot compute runs PyTorch's,
    in blocks of rows where a mask of all scores would be large, and what neither can express the definition."""
    given = arguments(node)
    native, sdpa = native_can(given), sdpa_can(given)
    if native and sdpa and measurable(context, given):
        form = shape_of(context, given)
        native = tuner.choose_attention(form, lambda: sample(context, given, form)) == "native"
    if native:
        return lower_native(context, given)
    if not (sdpa and has_flag(given)) and blocks_can(context, given):
        return lower_blocks(context, given)
    return lower_sdpa(context, given) if sdpa else lower_reference(context, given)


def lower_mapped(context: Context, node: fx.Node) -> fx.Node | None:
    """Emit one site of ``regraft::attention_mapped``; None where its definition is to run."""
    given = arguments(node)
    if native_can_map(context, given):
        return lower_native_map(context, given)
    return lower_blocks(context, given) if blocks_can(context, given) else None
