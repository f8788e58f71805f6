"""``regraft::pack_tokens``: which tokens of a padded batch are there, one after the other, as indices.

The length of the result depends on the data. Tokens of the ends that are asked for are packed even where they are
padding, and so are all tokens of a sample that has no other: what is computed for them is then what the padded batch
computes, because attention still knows that they are hidden (``present``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.ir.ops.registry import elementwise, register


def reference(mask: Tensor, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition. ``mask`` ``[batch, length]`` is not 0 where a token is there. Returns four int64 tensors but for
    the last, bool: ``index`` ``[1, tokens]``, the places of the packed tokens in the flattened batch, ascending;
    ``slots`` ``[1, batch * length]``, where each is found, -1 for none; ``offsets`` ``[batch + 1]``, where each sample
    begins; ``present`` ``[1, tokens]``, false for what is packed though it is padding."""
    there = mask != 0
    packed = there.clone()
    packed[:, :prefix] = True
    packed[:, there.shape[1] - suffix :] = True
    packed |= ~there.any(1, keepdim=True)
    flat = packed.reshape(-1)
    index = flat.nonzero()[:, 0]
    slots = torch.where(flat, flat.cumsum(0) - 1, -1)
    offsets = torch.nn.functional.pad(packed.sum(1).cumsum(0), (1, 0))
    return index[None], slots[None], offsets, there.reshape(-1)[index][None]


def _fake(mask: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = mask.shape
    tokens = torch.library.get_ctx().new_dynamic_size()

    def numbers(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=mask.device)

    packed = numbers(1, tokens, dtype=torch.bool)  # type: ignore[arg-type]
    return numbers(1, tokens), numbers(1, batch * length), numbers(batch + 1), packed  # type: ignore[arg-type]


pack_tokens = register(
    "pack_tokens",
    "(Tensor mask, int prefix=0, int suffix=0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    elementwise(4),
)
