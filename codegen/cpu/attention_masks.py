"""What both lowerings of attention ask of a mask: as a tensor, as a flag, taken apart, and whether two are the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.ir.mask import CAUSAL, And, Everything, Keys, Predicate, parse, to_dense
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import dtype, shape, size_equal

#: A score that is added to a number this low is lost, in fp32 too: adding it is writing it.
_ABSORBS = -1e30
#: Beside any score that is not masked, a number this low gets no weight; a row of nothing else is uniform.
_GETS_NO_WEIGHT = -1e4


@functools.lru_cache(maxsize=256)
def parsed(text: str) -> Predicate:
    """The predicate of a text, read once."""
    return parse(text)


def conjunction(parts: Sequence[Predicate]) -> Predicate:
    """All of the parts: everything for none, the part itself for one."""
    parts = [part for part in parts if not isinstance(part, Everything)]
    if len(parts) > 1:
        return And(tuple(parts))
    return parts[0] if parts else Everything()


def without_keys(predicate: Predicate) -> Predicate | None:
    """A conjunction without its padding; None when it has none, or reads other tensors too."""
    parts = predicate.operands if isinstance(predicate, And) else (predicate,)
    kept = tuple(part for part in parts if not isinstance(part, Keys))
    if len(kept) == len(parts) or any(tensors_of(part) for part in kept):
        return None
    return conjunction(kept)


def is_flag(predicate: Predicate, length: Any, keys: Any) -> str | None:
    """ "none" or "causal" when PyTorch's kernel has the predicate as a flag, else None."""
    if isinstance(predicate, Everything):
        return "none"
    return "causal" if predicate == CAUSAL and size_equal(length, keys) else None


def additive_mask(
    text: str,
    tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    query: Tensor,
    key_length: int,
    fill: float,
) -> Tensor:
    """What is added to the scores of ``query`` ``[batch, heads, length, head_dim]``: the bias where the predicate
    holds and ``fill`` elsewhere, ``[batch or 1, heads or 1, length or 1, keys]``, in ``query``'s element type."""
    length = query.shape[-2]
    predicate = parsed(text)
    added = torch.zeros((1, 1, 1, key_length), dtype=query.dtype, device=query.device)
    if bias is not None:
        added = added + bias
    if slopes is not None:
        places = torch.arange(key_length, device=query.device) - torch.arange(length, device=query.device)[:, None]
        added = added + slopes.reshape(-1, 1, 1) * places
    if not isinstance(predicate, Everything):
        rows, heads = (1, 1) if _is_padding(predicate) else (length, query.shape[1])
        allowed = to_dense(predicate, tensors, query.shape[0], heads, rows, key_length, query.device)
        added = added.masked_fill(~allowed, fill)
    added = added.to(query.dtype)
    return added.contiguous() if added.stride(-1) != 1 else added


def fixed_sizes(given: dict[str, Any]) -> tuple[int, int, int] | None:
    """Heads and lengths of a site's scores, where none of them is symbolic."""
    sizes = shape(given["query"])[1], shape(given["query"])[2], shape(given["key"])[2]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _is_padding(predicate: Predicate) -> bool:
    """Whether all rows and heads see the same keys."""
    parts = predicate.operands if isinstance(predicate, And) else (predicate,)
    return all(isinstance(part, Keys) for part in parts)


def mask_key(given: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for sites whose masks are the same tensor: same meaning, same inputs, same lengths."""
    sizes = tuple(str(size) for size in (*shape(given["query"])[:3], shape(given["key"])[-2]))
    read = (tuple(given["mask_tensors"]), given["bias"], given["slopes"])
    return (given["mask"], given.get("mask_fill"), *read, sizes, dtype(given["query"]))


def gets_no_weight(fill: float) -> bool:
    """Whether a key whose score is ``fill`` gets no weight beside one that is not masked."""
    return fill <= _GETS_NO_WEIGHT


def absorbs(fill: float | None) -> bool:
    """Whether adding ``fill`` to any score gives ``fill``, so that an additive mask says all of it."""
    return fill is not None and fill <= _ABSORBS
