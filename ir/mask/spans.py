"""The keys that each row sees as a union of intervals: sorted, disjoint, a few for each row.

Memory is linear in the lengths, so that a kernel which takes spans never meets a mask of the size of the scores.
``And``, ``Or`` and ``Not`` of spans are spans; what a tensor says (padding, documents, ancestors in a tree) is read as
runs of keys when the tensor is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.ir.mask.evaluate import to_dense
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

#: More intervals a row than these are no gain over a tensor of the size of the scores.
MOST_SPANS = 8


class TooMany(Exception):
    """A row sees more separate runs of keys than are worth listing."""


@dataclass(frozen=True)
class _Spans:
    """``start <= key < end``, each ``[batch or 1, heads or 1, rows or 1, count]``, sorted and disjoint; an interval
    that is not there starts and ends behind the last key."""

    start: Tensor
    end: Tensor


def has_spans(predicate: Predicate, conditions: Container[int] = ()) -> bool:
    """Whether the rows of a predicate can be spans at all, if they are few: it reads no mask of the size of the scores.
    ``conditions`` are tensors whose last dim is 1: true for all keys of a row or for none."""
    match predicate:
        case Dense(number):
            return number in conditions
        case Not(operand):
            return has_spans(operand, conditions)
        case And(operands) | Or(operands):
            return all(has_spans(operand, conditions) for operand in operands)
    return True


def most_spans(predicate: Predicate, conditions: Container[int] = ()) -> float:
    """The most intervals that a row can see, by the form of the predicate alone; infinite where a tensor says it."""
    match predicate:
        case Dense(number):
            return 1 if number in conditions else math.inf
        case Keys() | Same() | Bits():
            return math.inf
        case Not(operand):
            return most_spans(operand, conditions) + 1
        case And(operands):
            return sum(most_spans(operand, conditions) for operand in operands) - len(operands) + 1
        case Or(operands):
            return sum(most_spans(operand, conditions) for operand in operands)
    return 1


def spans(
    predicate: Predicate,
    heads: int,
    query_length: int,
    key_length: int,
    tensors: Sequence[Tensor] = (),
    symbols: Mapping[str, int] | None = None,
    dense: bool = False,
    limit: int | None = None,
) -> Tensor | None:
    """Where the intervals of keys of each row start and end: int64 ``[2, batch or 1, heads or 1, query_length,
    count]``, contiguous. None where some row has more than ``MOST_SPANS``, or, unless ``dense``, where a tensor of the
    size of the scores is read: looking at all of it is worth it only once. ``limit``: give up where a part of the
    predicate has more intervals a row; without it, and ``dense``, parts may have any number."""
    conditions = [number for number, tensor in enumerate(tensors) if tensor.dim() and tensor.shape[-1] == 1]
    if not dense and not has_spans(predicate, conditions):
        return None
    most = (limit or key_length + 1) if dense else MOST_SPANS  # a conjunction of many intervals may have few
    reader = _Reader(heads, query_length, key_length, tensors, symbols or {}, most)
    try:
        found = reader.read(predicate)
    except TooMany:
        return None
    if found.start.shape[-1] > MOST_SPANS:
        return None
    both = torch.stack(torch.broadcast_tensors(found.start, found.end))
    return both.expand(-1, -1, -1, query_length, -1).contiguous()


@dataclass(frozen=True)
class _Reader:
    """Reads predicates over one pair of lengths."""

    heads: int
    query_length: int
    key_length: int
    tensors: Sequence[Tensor]
    symbols: Mapping[str, int]
    most: int

    def read(self, predicate: Predicate) -> _Spans:
        match predicate:
            case Not(operand):
                return self._trim(self._complement(self.read(operand)))
            case And(operands):
                return self._fold(operands, self._intersection)
            case Or(operands):
                return self._fold(operands, self._union)
        return self._atom(predicate)

    def _fold(self, operands: Sequence[Predicate], combine: Callable[[_Spans, _Spans], _Spans]) -> _Spans:
        result = self.read(operands[0])
        for operand in operands[1:]:
            result = self._trim(combine(result, self.read(operand)))
        return result

    def _atom(self, predicate: Predicate) -> _Spans:
        sizes = {**self.symbols, QUERY_LENGTH: self.query_length, KEY_LENGTH: self.key_length}
        query = torch.arange(self.query_length).reshape(1, 1, -1, 1)
        whole = torch.full((1, 1, 1, 1), self.key_length)
        nothing = torch.zeros_like(whole)
        match predicate:
            case Everything():
                return self._interval(nothing, whole)
            case Nothing():
                return self._interval(nothing, nothing)
            case Band(lower, upper):
                start = nothing if lower is None else query + lower.evaluate(sizes)
                return self._interval(start, whole if upper is None else query + upper.evaluate(sizes) + 1)
            case Prefix(length):
                return self._interval(nothing, nothing + length.evaluate(sizes))
            case Chunk(size, offset):
                first = (query + offset.evaluate(sizes)) // size * size
                return self._interval(first, first + size)
            case Lengths(number):
                return self._interval(nothing, self.tensors[number].cpu().to(torch.int64).reshape(-1, 1, 1, 1))
            case Heads(first, last):
                head = torch.arange(self.heads).reshape(1, -1, 1, 1)
                return self._where((head >= first) & (head < last))
            case Rows(number):
                return self._where(self.tensors[number].cpu().reshape(-1, 1, self.query_length, 1) != 0)
            case Keys(number):
                return self._runs(self.tensors[number].cpu().reshape(-1, 1, 1, self.key_length) != 0, 0)
            case Dense(number):
                return self._dense(self.tensors[number].cpu() != 0)
            case Bits(number):
                return self._tree(predicate, self.tensors[number])
            case Same(left, right):
                return self._alike(self.tensors[left].cpu(), self.tensors[right].cpu())
        raise TypeError(f"not an atom: {predicate!r}")

    def _where(self, holds: Tensor) -> _Spans:
        """All keys where a condition ``[batch or 1, heads or 1, rows or 1, 1]`` holds, none elsewhere."""
        return self._interval(torch.zeros_like(holds, dtype=torch.int64), holds * self.key_length)

    def _interval(self, start: Tensor, end: Tensor) -> _Spans:
        start, end = torch.broadcast_tensors(start.clamp(min=0), end.clamp(max=self.key_length))
        return self._without_empty(start, end)

    def _without_empty(self, start: Tensor, end: Tensor) -> _Spans:
        there = start < end
        return _Spans(start.where(there, self.key_length), end.where(there, self.key_length))

    def _trim(self, found: _Spans) -> _Spans:
        """Sorted, and without columns that no row needs. Raises ``TooMany``."""
        count = int((found.start < found.end).sum(-1).max()) if found.start.numel() else 0
        if count > self.most:
            raise TooMany
        start, end = found.start.sort(-1).values, found.end.sort(-1).values
        return _Spans(start[..., : max(count, 1)], end[..., : max(count, 1)])

    def _complement(self, found: _Spans) -> _Spans:
        edge = torch.zeros_like(found.start[..., :1])
        start = torch.cat([edge, found.end], -1)
        end = torch.cat([found.start, edge + self.key_length], -1)
        return self._without_empty(start, end)

    def _intersection(self, left: _Spans, right: _Spans) -> _Spans:
        start = torch.maximum(left.start[..., :, None], right.start[..., None, :])
        end = torch.minimum(left.end[..., :, None], right.end[..., None, :])
        return self._without_empty(start.flatten(-2), end.flatten(-2))

    def _union(self, left: _Spans, right: _Spans) -> _Spans:
        sizes = torch.broadcast_shapes(left.start.shape[:-1], right.start.shape[:-1])
        start, order = torch.cat([part.start.expand(*sizes, -1) for part in (left, right)], -1).sort(-1)
        end = torch.cat([part.end.expand(*sizes, -1) for part in (left, right)], -1).gather(-1, order)
        reach = end.cummax(-1).values
        apart = start[..., 1:] > reach[..., :-1]  # a new interval begins here, and the one before has ended
        edge = torch.ones_like(apart[..., :1])
        start = start.where(torch.cat([edge, apart], -1), self.key_length).sort(-1).values
        end = reach.where(torch.cat([apart, edge], -1), self.key_length).sort(-1).values
        return self._without_empty(start, end)

    def _runs(self, seen: Tensor, offset: int) -> _Spans:
        """Runs of true keys of ``seen`` ``[…, keys]``, whose first key is ``offset``."""
        edge = torch.zeros_like(seen[..., :1])
        before, after = torch.cat([edge, seen[..., :-1]], -1), torch.cat([seen[..., 1:], edge], -1)
        place = torch.arange(offset, offset + seen.shape[-1]).expand(seen.shape)
        first, last = seen & ~before, seen & ~after
        count = int(first.sum(-1).max()) if seen.numel() else 0
        if count > self.most:
            raise TooMany
        if not count:
            return self._where(torch.zeros((*seen.shape[:-1], 1), dtype=torch.bool))
        start = place.where(first, self.key_length).topk(count, -1, largest=False).values
        end = (place + 1).where(last, self.key_length + 1).topk(count, -1, largest=False).values
        return self._without_empty(start, end.clamp(max=self.key_length))

    def _dense(self, seen: Tensor) -> _Spans:
        seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
        if seen.shape[-1] == 1:
            return self._where(seen)
        return self._runs(seen, 0)

    def _tree(self, predicate: Bits, words: Tensor) -> _Spans:
        """Only the keys that the words speak of are looked at."""
        known = min(64 * words.shape[-1], self.key_length, max(self.query_length, 1))
        skipped = self.key_length - known
        nodes = words.reshape(-1, self.query_length, words.shape[-1])
        shifted = {predicate.tensor: nodes}
        given = [shifted.get(number, nodes) for number in range(predicate.tensor + 1)]
        dense = to_dense(predicate, given, nodes.shape[0], 1, self.query_length, self.key_length)
        return self._runs(dense[..., skipped:], skipped)

    def _alike(self, rows: Tensor, keys: Tensor) -> _Spans:
        """Runs of keys whose number is the row's: one a row for documents that are packed one after the other."""
        rows, keys = rows.reshape(-1, self.query_length), keys.reshape(-1, self.key_length)
        batch = max(rows.shape[0], keys.shape[0])
        parts = [
            self._alike_of_one(r, k)
            for r, k in zip(rows.expand(batch, -1), keys.expand(batch, -1), strict=True)
        ]  # fmt: skip
        width = max((part.start.shape[-1] for part in parts), default=1)

        def padded(part: Tensor) -> Tensor:
            return torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=self.key_length)

        return _Spans(torch.stack([padded(p.start) for p in parts]), torch.stack([padded(p.end) for p in parts]))

    def _alike_of_one(self, rows: Tensor, keys: Tensor) -> _Spans:
        numbers, lengths = keys.unique_consecutive(return_counts=True)
        end = lengths.cumsum(0)
        order = numbers.argsort(stable=True)
        numbers, end, lengths = numbers[order], end[order], lengths[order]
        first, behind = (torch.searchsorted(numbers, rows, right=right) for right in (False, True))
        count = int((behind - first).max()) if rows.numel() else 0
        if count > self.most:
            raise TooMany
        place = first[:, None] + torch.arange(max(count, 1))
        there = place < behind[:, None]
        place = place.clamp(max=max(len(numbers) - 1, 0))
        start = (end - lengths)[place].where(there, self.key_length)
        return _Spans(start[None], end[place].where(there, self.key_length)[None])
