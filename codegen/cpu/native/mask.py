"""Launcher of ``mask.cpp``: a predicate and its tensors in, one bit for each score out.

A predicate is written in postfix order. What is a few spans of keys by its form is a table of these; numbers that rows
and keys share are compared as they are; what else a tensor says is read as a table.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER
from regraft.ir.mask import MOST_SPANS, And, Keys, Not, Or, Predicate, most_spans, spans, to_broadcast
from regraft.ir.mask.predicate import Dense, Same

_SPANS, _SAME, _TABLE, _NOT, _AND, _OR = range(6)


class _Step(ctypes.Structure):
    """``Step`` in ``mask.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("first", "second", "table")),
        *((name, LONG) for name in ("kind", "count")),
        ("strides", LONG * 3),
        ("key_stride", LONG),
    )


class _Mask(ctypes.Structure):
    """``Mask`` in ``mask.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("steps", "bits")),
        *((name, LONG) for name in ("count", "depth", "batch", "heads", "rows", "keys")),
    )


def mask_bits(
    library: ctypes.CDLL, predicate: Predicate, tensors: Sequence[Tensor], heads: int, length: int, keys: int
) -> Tensor:
    """Which keys each row sees, int32 ``[batch or 1, heads or 1, length or 1, words]``: the layout is that of
    ``mask.cpp``, for ``attend``. ``tensors`` are those that the predicate numbers."""
    writer = _Writer(tensors, heads, length, keys)
    depth = writer.write(predicate)
    words = library.regraft_mask_words(keys)
    bits = torch.empty((*writer.sizes, words), dtype=torch.int32)
    steps = (_Step * len(writer.steps))(*writer.steps)
    mask = _Mask(ctypes.addressof(steps), bits.data_ptr(), len(writer.steps), depth, *writer.sizes, keys)
    library.regraft_mask(ctypes.byref(mask))
    return bits


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and return."""
    library.regraft_mask_words.argtypes = [LONG]
    library.regraft_mask_words.restype = LONG
    library.regraft_mask.restype = None


@dataclass
class _Writer:
    """Writes the steps of a predicate, and keeps the tables that they read."""

    tensors: Sequence[Tensor]
    heads: int
    length: int
    keys: int
    steps: list[_Step] = field(default_factory=list)
    sizes: tuple[int, ...] = (1, 1, 1)  # batch, heads and rows that are told apart
    _tables: list[Tensor] = field(default_factory=list)

    def write(self, predicate: Predicate) -> int:
        """The steps; returns how many words they have at hand at most."""
        conditions = [number for number, tensor in enumerate(self.tensors) if tensor.dim() and tensor.shape[-1] == 1]
        if most_spans(predicate, conditions) <= MOST_SPANS:
            return self._spans(predicate)
        match predicate:
            case Not(operand):
                depth = self.write(operand)
                self.steps.append(_Step(kind=_NOT))
                return depth
            case And(operands) | Or(operands):
                return self._fold(operands, _AND if isinstance(predicate, And) else _OR)
            case Same(left, right) if not any(self.tensors[n].dtype.is_floating_point for n in (left, right)):
                return self._same(self.tensors[left], self.tensors[right])
            case Keys(number):
                return self._table(_truth(self.tensors[number]).reshape(-1, 1, 1, self.keys))
            case Dense(number):
                return self._table(_truth(self.tensors[number]))
        return self._table(to_broadcast(predicate, self.tensors, self.heads, self.length, self.keys))

    def _fold(self, operands: Sequence[Predicate], kind: int) -> int:
        depth = self.write(operands[0])
        for operand in operands[1:]:
            depth = max(depth, 1 + self.write(operand))
            self.steps.append(_Step(kind=kind))
        return depth

    def _spans(self, predicate: Predicate) -> int:
        table = spans(predicate, self.heads, self.length, self.keys, self.tensors)
        assert table is not None  # by the form of the predicate
        first, second = table.unbind(0)
        strides = self._kept(first)[:3]
        addresses = {"first": first.data_ptr(), "second": second.data_ptr()}
        self.steps.append(_Step(kind=_SPANS, count=first.shape[-1], strides=strides, **addresses))
        return 1

    def _same(self, rows: Tensor, keys: Tensor) -> int:
        rows = rows.to(torch.int64).reshape(-1, 1, self.length).contiguous()
        keys = keys.to(torch.int64).reshape(-1, 1, 1, self.keys).contiguous()
        key_stride, strides = self._kept(keys)[0], self._kept(rows)
        addresses = {"first": rows.data_ptr(), "second": keys.data_ptr()}
        self.steps.append(_Step(kind=_SAME, strides=strides, key_stride=key_stride, **addresses))
        return 1

    def _table(self, seen: Tensor) -> int:
        """A boolean tensor that broadcasts to all scores."""
        seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
        seen = seen.expand(-1, -1, -1, self.keys).contiguous()
        strides = self._kept(seen)[:3]
        self.steps.append(_Step(kind=_TABLE, table=seen.data_ptr(), strides=strides))
        return 1

    def _kept(self, table: Tensor) -> tuple[int, ...]:
        """Strides of a table ``[batch or 1, heads or 1, length or 1, …]`` of a step, nought along what it has once."""
        self._tables.append(table)
        self.sizes = tuple(map(max, self.sizes, table.shape[:3]))
        return tuple(0 if size == 1 else step for size, step in zip(table.shape, table.stride(), strict=True))


def _truth(tensor: Tensor) -> Tensor:
    """A boolean tensor as it is: a copy of a mask of all scores would take longer than its bits."""
    return tensor if tensor.dtype == torch.bool else tensor != 0
