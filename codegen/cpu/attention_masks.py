"""What both lowerings of attention ask of a mask: as a tensor, as a flag, taken apart, and whether two are the same."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Context
from regraft.ir import ops
from regraft.ir.mask import CAUSAL, And, Everything, Keys, Predicate, parse, to_broadcast
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import arguments, dtype, rank, shape, size_equal

aten = torch.ops.aten

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
        rows = 1 if _is_padding(predicate) else length
        allowed = to_broadcast(predicate, tensors, query.shape[1], rows, key_length, query.device)
        added = torch.where(allowed, added, fill)
    added = added.to(query.dtype)
    return added.contiguous() if added.stride(-1) != 1 else added


def fixed_sizes(given: dict[str, Any]) -> tuple[int, int, int] | None:
    """Heads and lengths of a site's scores, where none of them is symbolic."""
    sizes = shape(given["query"])[1], shape(given["query"])[2], shape(given["key"])[2]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def appended(given: dict[str, Any]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Keys, what is appended to them, values and what is appended, where a site's keys and values are joined in two
    pieces that attention alone reads: a cache and new tokens."""
    joined = [node for node in (given["key"], given.get("value")) if isinstance(node, fx.Node)]
    if len(joined) < 2 or any(node.target is not aten.cat.default for node in joined):
        return None
    if any(user.target not in (ops.attention, ops.attention_mapped) for node in joined for user in node.users):
        return None
    parts = [arguments(node) for node in joined]
    pieces = [piece for part in parts for piece in part["tensors"]]
    if any(len(part["tensors"]) != 2 or part["dim"] not in (2, -2) for part in parts):
        return None
    if any(rank(piece) != 4 or dtype(piece) != torch.float32 for piece in pieces):
        return None
    return tuple(pieces) if size_equal(shape(pieces[0])[2], shape(pieces[2])[2]) else None


def heads_and_length(context: Context, given: dict[str, Any]) -> list[int | fx.Node]:
    """The numbers of a site's heads and queries, in the lowered graph where they are symbolic."""
    return [_size(context, given["query"], dim) for dim in (1, 2)]


def key_length(context: Context, given: dict[str, Any]) -> int | fx.Node:
    """The number of a site's keys, in the lowered graph where it is symbolic."""
    size, pieces = shape(given["key"])[2], appended(given)
    if isinstance(size, int) or pieces is None:
        return _size(context, given["key"], 2)
    made: fx.Node = context.call(operator.add, *(_size(context, part, 2) for part in pieces[:2]))
    return made


def _size(context: Context, node: fx.Node, dim: int) -> int | fx.Node:
    size = shape(node)[dim]
    return size if isinstance(size, int) else context.call(aten.sym_size.int, context.value(node), dim)


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
