"""Launcher of ``tape.cpp``: many kernel calls as one, over memory that is laid out once for given sizes.

``Recorder`` follows the calls on the meta device; what they make gets a place in one block of memory, shared by
tensors that are never needed at the same time. A ``Tape`` is only read while it runs, so that any thread may run it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER, NativeCall

_ALIGNMENT = 64
_WORTH_KEEPING = 1 << 28  # bytes; a larger block is taken from the system for each run, which is then a small part
_WORKSPACE, _FIRST = 0, 1  # places among the bases


class Unrecordable(Exception):
    """A call whose memory cannot be laid out beforehand: it copies on the way, or makes nothing."""


class _Step(ctypes.Structure):
    """``Step`` in ``tape.cpp``, field by field."""

    _fields_ = (("kernel", POINTER), *((name, LONG) for name in ("place", "size", "first", "addresses")))


class _Address(ctypes.Structure):
    """``Address`` in ``tape.cpp``, field by field."""

    _fields_ = tuple((name, LONG) for name in ("field", "base", "offset"))


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and return."""
    library.regraft_run.argtypes = [POINTER, LONG, POINTER, POINTER, POINTER]
    library.regraft_run.restype = None
    library.regraft_largest_structure.restype = LONG


@dataclass
class _Buffer:
    """Memory that a call makes: needed from step ``first`` to step ``last``."""

    tensor: Tensor
    first: int
    last: int
    base: int = _WORKSPACE
    offset: int = 0

    @property
    def size(self) -> int:
        return self.tensor.untyped_storage().nbytes()


@dataclass(frozen=True)
class _Result:
    """A tensor that a run returns: which base it lies in, and how."""

    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Tape:
    """Steps over ``bases``: the workspace, the tensors that are made for results, then the inputs. ``kept`` are the
    tensors whose addresses the structures hold."""

    library: ctypes.CDLL
    steps: ctypes.Array[_Step]
    structures: ctypes.Array[ctypes.c_char]
    addresses: ctypes.Array[_Address]
    workspace: int
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    results: tuple[_Result, ...]
    kept: list[Tensor]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Make the calls; ``inputs`` are tensors of the sizes and strides that were recorded."""
        made = [torch.empty_strided(size, stride, dtype=dtype) for size, stride, dtype in self.made]
        workspace = _workspace(self.workspace)
        bases = [workspace.data_ptr(), *(tensor.data_ptr() for tensor in made)]
        bases += [tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size() for tensor in inputs]
        self.library.regraft_run(
            self.steps, len(self.steps), self.structures, self.addresses, (LONG * len(bases))(*bases)
        )
        sources = [workspace, *made, *inputs]
        return [_view(sources[result.base], result) for result in self.results]


def _view(source: Tensor, wanted: _Result) -> Tensor:
    whole = source.shape == wanted.size and source.stride() == wanted.stride
    if whole and source.storage_offset() == wanted.offset:
        return source
    return torch.as_strided(source, wanted.size, wanted.stride, wanted.offset)


@dataclass
class Recorder:
    """Collects calls on the meta device, whose ``inputs`` are meta tensors. ``library`` runs the tape."""

    library: ctypes.CDLL
    inputs: Sequence[Tensor]
    calls: list[NativeCall] = field(default_factory=list)
    _kernels: list[int | None] = field(default_factory=list)
    _buffers: dict[int, _Buffer] = field(default_factory=dict)

    def add(self, call: NativeCall, library: ctypes.CDLL) -> None:
        """The next call, of a kernel of ``library``; raises ``Unrecordable``."""
        number = len(self.calls)
        for tensor in call.made:
            if not tensor.is_meta or tensor.numel() == 0:
                raise Unrecordable(call.function)
            self._buffers[_storage(tensor)] = _Buffer(tensor, number, number)
        given = {_storage(tensor) for tensor in self.inputs}
        for tensor in (tensor for tensor in call.tensors if tensor is not None and tensor.is_meta):
            held = self._buffers.get(_storage(tensor))
            if held is not None:
                held.last = number
            elif _storage(tensor) not in given:
                raise Unrecordable(f"{call.function} copies an operand")
        self.calls.append(call)
        self._kernels.append(ctypes.cast(getattr(library, call.function), POINTER).value)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a meta tensor lies in memory that is known here."""
        return _storage(tensor) in self._buffers or any(_storage(tensor) == _storage(given) for given in self.inputs)

    def tape(self, results: Sequence[Tensor]) -> Tape:
        """The calls as they were added, returning ``results``, which ``holds`` is true of."""
        returned = {_storage(tensor) for tensor in results}
        own = [buffer for storage, buffer in self._buffers.items() if storage in returned]
        for number, buffer in enumerate(own):
            buffer.base = _FIRST + number
        bases = {_storage(tensor): _FIRST + len(own) + number for number, tensor in enumerate(self.inputs)}
        bases |= {storage: buffer.base for storage, buffer in self._buffers.items()}
        size = _lay_out([buffer for storage, buffer in self._buffers.items() if storage not in returned])
        steps, structures, addresses = self._written(bases)
        return Tape(
            self.library,
            (_Step * len(steps))(*steps),
            ctypes.create_string_buffer(structures, len(structures)),
            (_Address * len(addresses))(*addresses),
            size,
            tuple((tuple(b.tensor.shape), b.tensor.stride(), b.tensor.dtype) for b in own),
            tuple(
                _Result(bases[_storage(tensor)], tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
                for tensor in results
            ),
            [t for call in self.calls for t in call.tensors if t is not None and not t.is_meta],
        )

    def _written(self, bases: dict[int, int]) -> tuple[list[_Step], bytes, list[_Address]]:
        steps: list[_Step] = []
        structures, addresses = bytearray(), list[_Address]()
        for number, call in enumerate(self.calls):
            first = len(addresses)
            known = [None if tensor is None or tensor.is_meta else tensor.data_ptr() for tensor in call.tensors]
            structure = call.structure(*known, *call.values)
            _announce(structure, self.calls[number + 1 :])
            addresses += self._filled_in(call, bases)
            size = ctypes.sizeof(structure)
            if size > self.library.regraft_largest_structure():
                raise Unrecordable(f"{call.function} takes {size} bytes")
            steps.append(_Step(self._kernels[number], len(structures), size, first, len(addresses) - first))
            structures += bytes(structure)
        return steps, bytes(structures), addresses

    def _filled_in(self, call: NativeCall, bases: dict[int, int]) -> Iterator[_Address]:
        """The fields of a call whose addresses are known when it is made."""
        for place, tensor in enumerate(call.tensors):
            if tensor is not None and tensor.is_meta:
                buffer = self._buffers.get(_storage(tensor))
                start = int(tensor.storage_offset()) * tensor.element_size() + (0 if buffer is None else buffer.offset)
                yield _Address(place * ctypes.sizeof(POINTER), bases[_storage(tensor)], start)


def _announce(structure: ctypes.Structure, later: Sequence[NativeCall]) -> None:
    """Tell a kernel that can use it which packed weight is read next: it asks for that while it still computes."""
    weight = next((call.panels for call in later if call.panels is not None), None)
    if weight is not None and hasattr(structure, "next"):
        structure.next, structure.next_panels, structure.next_panel = (
            weight.data_ptr(),
            *weight.shape[:1],
            weight.stride(0),
        )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _lay_out(buffers: list[_Buffer]) -> int:
    """Give each buffer an offset where nothing lies that is needed meanwhile, the largest first; returns the size of
    the block (greedy by size, Pisarchyk & Lee 2020)."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: -buffer.size):
        others = sorted(
            (other for other in placed if other.first <= buffer.last and buffer.first <= other.last),
            key=lambda other: other.offset,
        )
        offset = 0
        for other in others:
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.size))
        buffer.offset = offset
        placed.append(buffer)
    return max((buffer.offset + buffer.size for buffer in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


_HELD = threading.local()


def _workspace(size: int) -> Tensor:
    """A block of at least ``size`` bytes: each thread keeps its own, because new memory costs more than arithmetic."""
    held: Tensor | None = getattr(_HELD, "block", None)
    if held is not None and held.numel() >= size:
        return held
    if size > _WORTH_KEEPING:
        return _pages(size)
    _HELD.block = held = None  # before a larger one is there
    _HELD.block = held = _pages(size)
    return held


def _pages(size: int) -> Tensor:
    """Memory of the system's own, which has it back as soon as the tensor is gone: of the C library's, blocks that
    were too small would stay."""
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process has its own
    return torch.frombuffer(pages, dtype=torch.uint8)
