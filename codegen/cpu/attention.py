"""Lowering attention to the CPU: the native kernel or PyTorch's, whichever is measured to be faster for a site."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.attention_blocks import blocks_can, lower_blocks
from regraft.codegen.cpu.attention_measured import measurable, sample, shape_of
from regraft.codegen.cpu.attention_native import lower_native, lower_native_map, native_can, native_can_map
from regraft.codegen.cpu.attention_reversed import lower_reversed
from regraft.codegen.cpu.attention_sdpa import has_flag, lower_reference, lower_sdpa, sdpa_can
from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir.nodes import arguments, dtype


def lower_attention(context: Context, node: fx.Node, tuner: Tuner) -> fx.Node:
    """Emit one attention site by what is measured to be faster there, the native kernel or PyTorch's. A mask of all
    scores is not made for PyTorch's where the native kernel or blocks of rows need none: memory would grow with the
    square of the lengths. What neither can express runs the definition."""
    given = arguments(node)
    sdpa, blocks = sdpa_can(given), blocks_can(context, given)
    large = given["bias"] is None and not has_flag(given)  # the mask that PyTorch's kernel would need
    other = "blocks" if blocks and (large or not sdpa) else "sdpa" if sdpa else "definition"
    if native_can(given) and _is_native(context, given, tuner, other):
        return lower_native(context, given)
    if other == "blocks":
        return lower_blocks(context, given)
    return lower_sdpa(context, given) if other == "sdpa" else lower_reference(context, given)


def _is_native(context: Context, given: dict[str, Any], tuner: Tuner, other: str) -> bool:
    """Whether the native kernel, which can, is to run a site rather than the ``other``: blocks of a plain softmax may
    only be faster in the low precision that a processor computes in."""
    plain = all(given[name] is None for name in ("bias", "slopes", "sinks")) and not given["softcap"]
    narrow = plain and dtype(given["query"]) != torch.float32
    if other == "definition" or (other == "blocks" and not narrow):
        return True
    if not measurable(context, given):
        return dtype(given["query"]) == torch.float32
    form = shape_of(context, given)
    return tuner.choose_attention(form, lambda: sample(context, given, form, other)) == "native"


def lower_mapped(context: Context, node: fx.Node) -> fx.Node | None:
    """Emit one site of ``regraft::attention_mapped``; None where its definition is to run."""
    given = arguments(node)
    reversed_site = lower_reversed(context, given)
    if reversed_site is not None:
        return reversed_site
    if native_can_map(context, given):
        return lower_native_map(context, given)
    return lower_blocks(context, given) if blocks_can(context, given) else None
