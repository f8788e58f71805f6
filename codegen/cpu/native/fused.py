"""Launcher of ``fused.cpp``: a row program, which is data, on the tensors of one call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER, NativeCall

#: Instructions by name, in the order of ``Word`` in ``fused.cpp``.
WORDS = (
    "load", "store", "fill", "move", "expand", "sum", "mean", "amax", "amin",
    "copy", "neg", "abs", "reciprocal", "sqrt", "rsqrt", "floor", "ceil", "exp", "log", "sin", "cos", "erf", "tanh",
    "sigmoid", "relu", "silu", "gelu", "gelu_tanh", "expm1", "log1p", "not",
    "add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor",
    "where",
)  # fmt: skip
MOST_OPERANDS, MOST_AXES = 16, 4
_PACKING = struct.Struct("13if")


@dataclass(frozen=True)
class Instruction:
    """``Instruction`` in ``fused.cpp``, field by field: registers, -1 for none; the operand that is read or written;
    what else a word wants."""

    word: str
    to: int = -1
    a: int = -1
    b: int = -1
    c: int = -1
    operand: int = -1
    width: int = 1
    columns: int = 0
    from_width: int = 0
    first: int = 0
    step: int = 1
    at: int = 0
    to_step: int = 1
    number: float = 0.0

    def packed(self) -> bytes:
        """As the kernel reads it."""
        numbers = (self.to, self.a, self.b, self.c, self.operand, self.width)
        moved = (self.columns, self.from_width, self.first, self.step, self.at, self.to_step)
        return _PACKING.pack(WORDS.index(self.word), *numbers, *moved, self.number)


@dataclass(frozen=True)
class Place:
    """How the dims of an operand meet the rows of a program: for each axis the dim that runs along it, for the columns
    theirs; None where the operand has none and is repeated."""

    axes: tuple[int | None, ...]
    columns: int | None


@dataclass(frozen=True)
class Made:
    """A result: ``dims`` has for each dim the axis whose size it has, or None and its size; ``order`` the dims from the
    outermost in memory."""

    place: Place
    dims: tuple[tuple[int | None, int], ...]
    order: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class RowProgram:
    """``code`` works on ``registers`` blocks of rows, at most ``columns`` wide; ``whole``: rows cannot be cut. Each of
    ``axes`` has its size from a dim of an operand."""

    code: Tensor
    registers: int
    columns: int
    whole: bool
    axes: tuple[tuple[int, int], ...]
    reads: tuple[Place, ...]
    writes: tuple[Made, ...]


class _Fused(ctypes.Structure):
    """``Fused`` in ``fused.cpp``, field by field."""

    _fields_ = (
        *((f"operand_{number}", POINTER) for number in range(MOST_OPERANDS)),
        ("program", POINTER),
        *((name, LONG) for name in ("instructions", "registers", "columns", "whole", "axes")),
        ("sizes", LONG * MOST_AXES),
        ("kinds", LONG * MOST_OPERANDS),
        ("strides", (LONG * (MOST_AXES + 1)) * MOST_OPERANDS),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the function returns."""
    library.regraft_fused.restype = None


def code_of(instructions: Sequence[Instruction]) -> Tensor:
    """Instructions as the kernel reads them."""
    return torch.frombuffer(bytearray(b"".join(item.packed() for item in instructions)), dtype=torch.uint8)


def fused(library: ctypes.CDLL, program: RowProgram, *operands: Tensor) -> NativeCall:
    """The results of a row program, of fp32 or bool as its operands are."""
    sizes = [operands[operand].shape[dim] for operand, dim in program.axes]
    device = next((tensor.device for tensor in operands if tensor.is_meta), operands[0].device)
    made = tuple(_empty(result, sizes, device) for result in program.writes)
    tensors = (*operands, *made)
    places = (*program.reads, *(result.place for result in program.writes))
    strides = [_strides(tensor, place) for tensor, place in zip(tensors, places, strict=True)]
    axes = _joined(sizes, strides)
    none = [None] * (MOST_OPERANDS - len(tensors))
    rows = [[row[axis] for axis in axes.kept] for row in strides]
    values = (
        len(program.code) // _PACKING.size, program.registers, program.columns, program.whole, len(axes.kept),
        (LONG * MOST_AXES)(*axes.sizes),
        (LONG * MOST_OPERANDS)(*(tensor.dtype == torch.bool for tensor in tensors)),
        ((LONG * (MOST_AXES + 1)) * MOST_OPERANDS)(
            *((LONG * (MOST_AXES + 1))(*row, *[0] * (MOST_AXES - len(row)), held[-1])
              for row, held in zip(rows, strides, strict=True))
        ),
    )  # fmt: skip
    result = made[0] if len(made) == 1 else made
    return NativeCall("regraft_fused", _Fused, (*tensors, *none, program.code), values, result, made)


def _empty(result: Made, sizes: Sequence[int], device: torch.device) -> Tensor:
    shape = [size if axis is None else sizes[axis] for axis, size in result.dims]
    strides, step = [0] * len(shape), 1
    for dim in reversed(result.order):
        strides[dim] = step
        step *= shape[dim]
    return torch.empty_strided(shape, strides, dtype=result.dtype, device=device)


def _strides(tensor: Tensor, place: Place) -> list[int]:
    """Strides along the axes, then along the columns; zero where the tensor is repeated."""
    found = [0 if dim is None or tensor.shape[dim] == 1 else tensor.stride(dim) for dim in place.axes]
    if place.columns is None or tensor.shape[place.columns] == 1:
        return [*found, 0]
    return [*found, tensor.stride(place.columns)]


@dataclass(frozen=True)
class _Axes:
    """Axes that are left when neighbours that every tensor goes along as one are joined: the inner one's number, and
    their size together."""

    kept: list[int]
    sizes: list[int]


def _joined(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> _Axes:
    kept: list[int] = []
    joined: list[int] = []
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        if kept and all(row[kept[-1]] == row[axis] * size for row in strides):
            kept[-1] = axis
            joined[-1] *= size
        else:
            kept.append(axis)
            joined.append(size)
    return _Axes(kept, joined)
