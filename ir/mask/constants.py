"""Masks held in a constant tensor (the causal buffer of older models): the band it is, by comparing every
entry."""

from __future__ import annotations

import torch

from regraft.ir.mask.expression import Expression, Index, const
from regraft.ir.mask.logic import and_, less_equal, number, subtract

MAX_ENTRIES = 1 << 24


def band_of_constant(value: torch.Tensor, indices: tuple[Expression, ...]) -> Expression | None:
    """``lower <= key - query <= upper`` where a tensor [..1, L, S] of 0/1 or bool is exactly that; None
    otherwise."""
    if value.numel() == 1 and not value.dtype.is_complex:
        return const(value.item())
    if value.dim() < 2 or value.numel() > MAX_ENTRIES or value.shape[-2:].numel() != value.numel():
        return None
    rows, columns = value.shape[-2:]
    grid = value.reshape(rows, columns)
    if grid.dtype != torch.bool and not bool(((grid == 0) | (grid == 1)).all()):
        return None
    offsets = torch.arange(columns) - torch.arange(rows)[:, None]
    visible = grid.bool().cpu()
    if not bool(visible.any()) or not isinstance(indices[-1], Index) or not isinstance(indices[-2], Index):
        return None
    lower, upper = int(offsets[visible].min()), int(offsets[visible].max())
    if not torch.equal(visible, (offsets >= lower) & (offsets <= upper)):
        return None
    offset = subtract(indices[-1], indices[-2])
    # A bound which no entry of the tensor reaches is dropped: it says nothing.
    below = [] if lower <= 1 - rows else [less_equal(const(lower), offset)]
    above = [] if upper >= columns - 1 else [less_equal(offset, const(upper))]
    band = and_(*below, *above)
    return band if value.dtype == torch.bool else number(band)
