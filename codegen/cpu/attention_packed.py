"""Lowering attention inside the samples of a packed batch: a token's sample is a span of keys to the native kernel.

What that cannot say (tokens that are packed though they are padding, masks that are no interval of places) runs the
definition, sample by sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_masks import parsed
from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import attend_native
from regraft.ir.mask import intervals
from regraft.ir.nodes import arguments, dtype
from regraft.ir.ops.attention_packed import reference


def lower_packed(context: Context, node: fx.Node) -> Lowered | None:
    """Emit one site; sites of one batch and mask share what is known of its tokens."""
    given = arguments(node)
    operands = [context.value(given[name]) for name in ("query", "key", "value")]
    if any(dtype(given[name]) != torch.float32 for name in ("query", "key", "value")) or NATIVE.missing():
        return None
    index, offsets, present = places = [context.value(given[name]) for name in ("index", "offsets", "present")]
    length, mask = given["length"], given["mask"]
    filled = given["mask_fill"] is not None
    spans = context.shared(
        ("packed spans", *places, length, mask, filled),
        lambda: context.call(packed_spans, index, offsets, present, length, mask, filled),
    )
    options = [given[name] for name in ("scale", "mask_fill", "empty_rows", "softcap")]
    return Lowered(full=context.call(attend_packed, *operands, *places, spans, length, mask, *options))


def packed_spans(
    index: Tensor, offsets: Tensor, present: Tensor, length: int, mask: str, filled: bool
) -> Tensor | None:
    """Where the keys of each packed token start and end, ``[2, 1, 1, tokens, 1]``; None where the kernel cannot say it.

    ``index`` ``[1, tokens]``, ``offsets`` and ``present`` are those of ``regraft::pack_tokens``; ``mask`` is said of
    places in samples of ``length``. ``filled``: what it hides has a number for a score, so that a row without keys
    gives the mean of its whole sample, which the kernel does not know.
    """
    if not bool(present.all()):
        return None
    if mask == "all":
        bounds = [offsets[:-1], offsets[1:]]
        counts = offsets.diff()
        found = [bound.repeat_interleave(counts, output_size=index.shape[1]) for bound in bounds]
    else:
        tables = intervals(parsed(mask), length, length, [])
        if tables is None:
            return None
        flat = index[0]
        first, place = flat - flat % length, flat % length
        found = [torch.searchsorted(flat, first + table.expand(1, length)[0][place]) for table in tables]
    if filled and not bool((found[0] < found[1]).all()):
        return None
    return torch.stack(found)[:, None, None, :, None].contiguous()


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    offsets: Tensor,
    present: Tensor,
    spans: Tensor | None,
    length: int,
    mask: str,
    scale: float,
    mask_fill: float | None,
    empty_rows: str,
    softcap: float,
) -> Tensor:
    """``regraft::attention_packed``, by the native kernel where there are spans."""
    if spans is None:
        options = length, scale, mask, mask_fill, empty_rows, softcap
        return reference(query, key, value, index, offsets, present, *options)
    out: Tensor = attend_native(query, key, value, None, None, None, scale, softcap, spans, None, empty_rows)
    return out
