"""Attention in blocks of rows, where the native kernel does not run: no compiler, or low precision that PyTorch is
faster in.

A block takes the keys that its rows see, gathered from their spans, to PyTorch's kernel or to the definition, so that
memory stays linear in the lengths. Heads that see other keys than their neighbours are blocks of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_masks import gets_no_weight, heads_and_length, key_length
from regraft.codegen.cpu.attention_parts import span_table, take_apart
from regraft.codegen.cpu.context import Context
from regraft.ir.mask import Everything, every_row_nonempty, parse, proof_lengths
from regraft.ir.nodes import shape
from regraft.ir.ops.attention import reference
from regraft.ir.ops.attention_mapped import reference as reference_of_map

_SCORES = 1 << 21  # of a block, all batches and heads together
_FEWEST_ROWS = 16
_WORTH_BLOCKS = 1 << 20  # scores of a head; below, one mask for all layers is cheaper than blocks

#: ``(query, key, value, allowed, bias, heads)`` of a block: ``allowed`` and ``bias`` broadcast to its scores, ``heads``
#: are those of the block among all.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, slice], Tensor]


@dataclass(frozen=True)
class Block:
    """Rows ``[first, last)`` of some heads, and the keys that one of them sees: ``[count]`` indices, or a slice."""

    heads: slice
    rows: slice
    keys: slice | Tensor


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, bias: Tensor | None, slopes: Tensor | None, attend: Attend
) -> Tensor:
    """``attend`` on each block of rows; ``table`` holds the spans (``ir/mask/spans``). The result is ``[batch, heads,
    length, value_dim]``. What ``bias`` and ``slopes`` add goes to a block as its bias."""
    batch, heads, length = query.shape[:3]
    out = query.new_empty((batch, heads, length, value.shape[3]))
    groups = heads // key.shape[1]
    for block in blocks(table, batch, heads, groups, length, key.shape[2]):
        own = slice(block.heads.start // groups, -(-block.heads.stop // groups))
        place = _places(block.keys)
        seen = table[:, :, block.heads if table.shape[2] > 1 else slice(None), block.rows]
        allowed = ((place >= seen[0, ..., None]) & (place < seen[1, ..., None])).any(-2)
        given = (query[:, block.heads, block.rows], key[:, own, block.keys], value[:, own, block.keys])
        out[:, block.heads, block.rows] = attend(
            *given, allowed, _bias_of(block, place, bias, slopes), block.heads
        )  # fmt: skip
    return out


def blocks(table: Tensor, batch: int, heads: int, groups: int, length: int, keys: int) -> Iterator[Block]:
    """The blocks of a table: heads with equal spans together, as many rows as give ``_SCORES`` scores at most."""
    for own in _alike(table, heads, groups):
        columns = table[:, :, own if table.shape[2] > 1 else slice(None)]
        start = 0
        while start < length:
            rows = _FEWEST_ROWS
            found = _union(columns[:, :, :, start : start + rows], keys)
            wide = max(1, found.stop - found.start if isinstance(found, slice) else len(found))
            count = max(_FEWEST_ROWS, _SCORES // (wide * batch * (own.stop - own.start)))
            count = min(count, max(_FEWEST_ROWS, wide))  # a band's union grows with its rows
            if count > rows:
                found = _union(columns[:, :, :, start : start + count], keys)
            yield Block(own, slice(start, min(start + count, length)), found)
            start += count


def _alike(table: Tensor, heads: int, groups: int) -> Iterator[slice]:
    """Runs of heads that see the same keys; the ``groups`` of queries that share a key are never parted."""
    if table.shape[2] == 1:
        yield slice(0, heads)
        return
    start = 0
    for head in range(groups, heads + 1, groups):
        if head == heads or not torch.equal(table[:, :, head : head + groups], table[:, :, start : start + groups]):
            yield slice(start, head)
            start = head


def _union(seen: Tensor, keys: int) -> slice | Tensor:
    """The keys that some row of ``[2, batch, heads, rows, count]`` sees."""
    start, end = seen.flatten(1)
    there = start < end
    if not bool(there.any()):
        return slice(0, min(1, keys))  # rows without a key are settled by whoever attends: they need some key
    steps = torch.zeros(keys + 1, dtype=torch.int64)
    ones = torch.ones_like(start[there])
    steps.index_add_(0, start[there], ones).index_add_(0, end[there], -ones)
    place = (steps.cumsum(0)[:-1] > 0).nonzero()[:, 0]
    first, last = int(place[0]), int(place[-1]) + 1
    return slice(first, last) if len(place) == last - first else place


def _places(keys: slice | Tensor) -> Tensor:
    return torch.arange(keys.start, keys.stop) if isinstance(keys, slice) else keys


def _bias_of(block: Block, place: Tensor, bias: Tensor | None, slopes: Tensor | None) -> Tensor | None:
    added: Tensor | None = None
    if bias is not None:
        full = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
        heads, rows, keys = (
            part if size > 1 else slice(None)
            for part, size in zip((block.heads, block.rows, block.keys), full.shape[1:], strict=True)
        )
        added = full[:, heads, rows][..., keys]
    if slopes is not None:
        distance = place - torch.arange(block.rows.start, block.rows.stop)[:, None]
        sloped = slopes[block.heads].reshape(1, -1, 1, 1).float() * distance
        added = sloped if added is None else added + sloped
    return added


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    empty_rows: str,
    softcap: float,
) -> Tensor:
    """``regraft::attention`` in blocks; a number under masks is not among what it takes."""

    def define(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, added: Tensor | None, heads: slice) -> Tensor:
        sink = None if sinks is None else sinks[heads]
        return reference(q, k, v, [allowed], added, None, sink, scale, "dense(0)", None, empty_rows, softcap)

    def call(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, added: Tensor | None, heads: slice) -> Tensor:
        hidden = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -math.inf)
        mask = hidden if added is None else (hidden + added).to(q.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        empty = ~allowed.any(-1, keepdim=True)
        return out.masked_fill(empty, 0.0 if empty_rows == "zero" else math.nan) if bool(empty.any()) else out

    plain = sinks is None and not softcap and bias is None
    return attend_in_blocks(query, key, value, table, bias, slopes, call if plain else define)


def attend_blocks_mapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    *options: Any,
) -> Tensor:
    """``regraft::attention_mapped`` in blocks; ``options`` are scale, softcap, weight, normaliser, constant."""
    scale, softcap, weight, normaliser, constant = options

    def define(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, added: Tensor | None, heads: slice) -> Tensor:
        return reference_of_map(
            q, k, v, [allowed], added, None, scale, "dense(0)", softcap, weight, normaliser, constant
        )  # fmt: skip

    return attend_in_blocks(query, key, value, table, bias, slopes, define)


def blocks_can(context: Context, given: dict[str, Any]) -> bool:
    """Whether a site gains by blocks: its mask is spans by its form, masked keys get no weight, and scores are many."""
    parts = take_apart(context, given)
    if any(not isinstance(part, Everything) for part in (parts.known, parts.runs, parts.keys, parts.rest)):
        return False
    length, keys = shape(given["query"])[2], shape(given["key"])[2]
    fill = given.get("mask_fill")
    lengths = proof_lengths(length, keys)
    if fill is not None and not (gets_no_weight(fill) and every_row_nonempty(parse(given["mask"]), *lengths)):
        return False
    return not (isinstance(length, int) and isinstance(keys, int)) or length * keys >= _WORTH_BLOCKS


def lower_blocks(context: Context, given: dict[str, Any]) -> fx.Node:
    """Emit one site of either operator."""
    query, key, value = (context.value(given[name]) for name in ("query", "key", "value"))
    tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
    sizes = *heads_and_length(context, given), key_length(context, given)
    table = context.call(span_table, given["mask"], tensors, *sizes)
    optional = [None if given[name] is None else context.value(given[name]) for name in ("bias", "slopes")]
    if "weight" in given:
        options = [given[name] for name in ("scale", "softcap", "weight", "normaliser", "constant")]
        return context.call(attend_blocks_mapped, query, key, value, table, *optional, *options)
    sinks = None if given["sinks"] is None else context.value(given["sinks"])
    rest = [given[name] for name in ("scale", "empty_rows", "softcap")]
    return context.call(attend_blocks, query, key, value, table, *optional, sinks, *rest)
