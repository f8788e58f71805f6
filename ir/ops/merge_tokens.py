"""``regraft::merge_tokens``: tokens brought together as a plan says, each in the share of its size.

``x'_j = sum over i in slot j of s_i x_i / s'_j`` with ``s'_j`` the sum of their sizes (Bolya et al., "Token Merging:
Your ViT But Faster", ICLR 2023). Written as ``x_j + sum of (s_i / s'_j) (x_i - x_j)`` over the tokens that come to
``j``: a token that nothing merges into keeps its bits, and so does one that only its equals merge into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register
from regraft.ir.ops.unmerge_tokens import rows


def reference(x: Tensor, sizes: Tensor | None, kept: Tensor, sources: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The definition. ``x`` is ``[batch, tokens, width]``, ``sizes`` ``[batch, tokens]`` (None: all one); ``kept``,
    ``sources`` and ``slots`` are a plan of ``regraft::plan_merge``. Returns the tokens ``[batch, left, width]`` in
    ``x``'s type and their sizes ``[batch, left]`` in fp32. Sums are in fp32 or wider, in the order of the sources."""
    wide = torch.promote_types(x.dtype, torch.float32)
    left = kept.shape[1]
    size = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes.float()
    target = slots.gather(1, sources)
    dropped = target < 0
    target = target.clamp(min=0)
    flat = (target + left * torch.arange(x.shape[0], device=x.device)[:, None]).reshape(-1)
    coming = size.gather(1, sources).masked_fill(dropped, 0.0)
    total = size.gather(1, kept).reshape(-1).index_add(0, flat, coming.reshape(-1)).reshape(kept.shape)
    staying = rows(x, kept).to(wide)
    share = coming.to(wide) / total.gather(1, target)
    difference = (rows(x, sources).to(wide) - rows(staying, target)) * share[..., None]
    difference = difference.masked_fill(dropped[..., None], 0.0)
    merged = staying.reshape(-1, x.shape[2]).index_add(0, flat, difference.reshape(-1, x.shape[2]))
    return merged.reshape(staying.shape).to(x.dtype), total


def _fake(x: Tensor, kept: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    merged = torch.empty((*kept.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    return merged, torch.empty(kept.shape, dtype=torch.float32, device=x.device)


merge_tokens = register(
    "merge_tokens",
    "(Tensor x, Tensor? sizes, Tensor kept, Tensor sources, Tensor slots) -> (Tensor, Tensor)",
    reference,
    _fake,
    elementwise(2),
)
