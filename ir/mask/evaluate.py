"""Predicates on real tensors: ``to_dense``, the reference meaning, and ``intervals`` for kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regraft.ir.mask.length import KEY_LENGTH, QUERY_LENGTH
from regraft.ir.mask.predicate import (
    And,
    Band,
    Bits,
    Chunk,
    Dense,
    Everything,
    Heads,
    Keys,
    Lengths,
    Not,
    Nothing,
    Or,
    Predicate,
    Prefix,
    Rows,
    Same,
)

_WORD = 64  # bits of an integer of Bits


def to_dense(
    predicate: Predicate,
    tensors: Sequence[Tensor],
    batch: int,
    heads: int,
    query_length: int,
    key_length: int,
    device: torch.device | str = "cpu",
    symbols: Mapping[str, int] | None = None,
    some: slice = slice(None),
) -> Tensor:
    """The mask as a boolean tensor [batch, heads, query_length, key_length], true = visible.

    ``symbols``: values of names other than ``query_len`` and ``key_len`` in the bounds; ``some``: these rows only.
    """
    told = to_broadcast(predicate, tensors, heads, query_length, key_length, device, symbols, some)
    return told.expand(batch, heads, len(range(query_length)[some]), key_length).clone()


def to_broadcast(
    predicate: Predicate,
    tensors: Sequence[Tensor],
    heads: int,
    query_length: int,
    key_length: int,
    device: torch.device | str = "cpu",
    symbols: Mapping[str, int] | None = None,
    some: slice = slice(None),
) -> Tensor:
    """The mask as ``to_dense`` has it, but a size is 1 where the predicate tells nothing apart: ``[batch or 1, heads or
    1, query_length or 1, key_length or 1]``. It may be a view of one of the tensors."""
    sizes = {**(symbols or {}), QUERY_LENGTH: query_length, KEY_LENGTH: key_length}

    @functools.cache  # most masks ask for neither
    def query() -> Tensor:
        return torch.arange(query_length, device=device)[some, None]

    @functools.cache
    def key() -> Tensor:
        return torch.arange(key_length, device=device)[None, :]

    def rows(number: int) -> Tensor:
        return tensors[number].to(device).reshape(-1, 1, query_length, 1)[:, :, some]

    def keys(number: int) -> Tensor:
        return tensors[number].to(device).reshape(-1, 1, 1, key_length)

    def bits(words: Tensor) -> Tensor:
        words = words.reshape(-1, query_length, words.shape[-1])[:, some]
        place = key()[0] - (key_length - query_length)
        chosen = words[..., (place // _WORD).clamp(0, words.shape[-1] - 1)]
        known = (place >= 0) & (place < _WORD * words.shape[-1])
        return ((chosen >> (place % _WORD)) & 1 == 1) & known

    def visit(node: Predicate) -> Tensor:
        match node:
            case Everything():
                return torch.ones((1, 1), dtype=torch.bool, device=device)
            case Nothing():
                return torch.zeros((1, 1), dtype=torch.bool, device=device)
            case Band(lower, upper):
                inside = torch.ones((1, 1), dtype=torch.bool, device=device)
                if lower is not None:
                    inside = inside & (key() >= query() + lower.evaluate(sizes))
                return inside if upper is None else inside & (key() <= query() + upper.evaluate(sizes))
            case Prefix(length):
                return key() < length.evaluate(sizes)
            case Lengths(number):
                return key() < tensors[number].to(device).reshape(-1, 1, 1, 1)
            case Keys(number):
                return keys(number) != 0
            case Rows(number):
                return rows(number) != 0
            case Same(left, right):
                return rows(left) == keys(right)
            case Chunk(size, offset):
                return (query() + offset.evaluate(sizes)) // size == key() // size
            case Dense(number):
                pairs = tensors[number].to(device)
                return (pairs if pairs.dim() < 2 or pairs.shape[-2] == 1 else pairs[..., some, :]) != 0
            case Heads(first, last):
                head = torch.arange(heads, device=device)[:, None, None]
                return (head >= first) & (head < last)
            case Bits(number):
                return bits(tensors[number].to(device))[:, None]
            case Not(operand):
                return ~visit(operand)
            case And(operands):
                result = visit(operands[0])
                for operand in operands[1:]:
                    result = result & visit(operand)
                return result
            case Or(operands):
                result = visit(operands[0])
                for operand in operands[1:]:
                    result = result | visit(operand)
                return result
        raise TypeError(f"not a predicate: {node!r}")

    found = visit(predicate)
    return found.reshape((1,) * (4 - found.dim()) + tuple(found.shape))


def intervals(
    predicate: Predicate,
    query_length: int,
    key_length: int,
    tensors: Sequence[Tensor] = (),
    symbols: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Visible keys ``start <= key < end`` per batch (1 if all are alike) and row: two int64 tensors [batch or
    1, L].

    For a conjunction of bands, prefixes, negated prefixes, lengths and chunks; None for any other predicate.
    An empty row has ``start == end``.
    """
    sizes = {**(symbols or {}), QUERY_LENGTH: query_length, KEY_LENGTH: key_length}
    query = torch.arange(query_length)[None, :]
    start = torch.zeros((1, query_length), dtype=torch.int64)
    end = torch.full((1, query_length), key_length, dtype=torch.int64)
    for atom in predicate.operands if isinstance(predicate, And) else (predicate,):
        match atom:
            case Everything():
                pass
            case Nothing():
                end = torch.zeros_like(end)
            case Band(lower, upper):
                if lower is not None:
                    start = torch.maximum(start, query + lower.evaluate(sizes))
                if upper is not None:
                    end = torch.minimum(end, query + upper.evaluate(sizes) + 1)
            case Prefix(length):
                end = end.clamp(max=length.evaluate(sizes))
            case Not(Prefix(length)):
                start = start.clamp(min=length.evaluate(sizes))
            case Lengths(number):
                end = torch.minimum(end, tensors[number].cpu().to(torch.int64).reshape(-1, 1))
            case Not(Lengths(number)):
                start = torch.maximum(start, tensors[number].cpu().to(torch.int64).reshape(-1, 1))
            case Chunk(size, offset):
                first = (query + offset.evaluate(sizes)) // size * size
                start, end = torch.maximum(start, first), torch.minimum(end, first + size)
            case _:
                return None
    start, end = start.clamp(max=key_length), end.clamp(min=0)
    return start + torch.zeros_like(end), torch.maximum(start, end)
