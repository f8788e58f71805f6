"""CUDA graphs: the calls of one compiled entry recorded once and replayed, so that a call costs one launch.

A graph holds for one set of shapes and for the memory that it was recorded with. Inputs are therefore copied into
buffers of its own, and outputs out of them; what shares memory among the outputs shares it in the copies too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from regraft.ir.capture_error import first_line
from regraft.ir.ops.gather import collective_calls
from regraft.ir.program import Program

_WARM_UPS = 2  # kernels are compiled, and libraries take their workspaces, before anything is recorded
_SHARED = "an output shares memory with an input, which a graph cannot give back"

Run = Callable[..., Sequence[Any]]


class Capture(Protocol):
    """One recording on a device."""

    def record(self, run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Run what is to be replayed, and return its outputs, whose memory every replay writes anew."""

    def replay(self) -> None:
        """Do again what was recorded."""

    def turn(self) -> AbstractContextManager[None]:
        """The block in which a call copies, replays and copies: behind that of the call before on the device."""


class GpuCapture:
    """A ``torch.cuda.CUDAGraph`` on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()

    def record(self, run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Warm up on a stream beside, then record."""
        with torch.cuda.device(self._device):
            beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(beside)
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                return run()

    def replay(self) -> None:
        """Replay on the current stream."""
        self._graph.replay()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Calls may come on several streams, and all write to the same buffers."""
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done.record()


class Graphed:
    """An executable that is recorded at its first call and replayed from then on.

    A call of other shapes runs the executable itself, and so does every call where recording fails (code that waits
    for the device, say); ``tell`` gets the reason. Calls of several threads take turns.
    """

    def __init__(self, executable: Run, capture: Capture, tell: Callable[[str], None]) -> None:
        self._executable, self._capture, self._tell = executable, capture, tell
        self._lock = threading.Lock()
        self._inputs: list[Any] | None = None
        self._outputs: Sequence[Any] = ()
        self._refused = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        with self._lock:
            if self._inputs is None and not self._refused:
                self._record(inputs)
            if self._inputs is not None and _alike(self._inputs, inputs):
                with self._capture.turn():
                    for held, given in zip(self._inputs, inputs, strict=True):
                        if isinstance(held, Tensor):
                            held.copy_(given)
                    self._capture.replay()
                    return copies(self._outputs)
        return self._executable(*inputs)

    def _record(self, inputs: Sequence[Any]) -> None:
        with torch.no_grad():
            held = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        try:
            outputs = self._capture.record(lambda: self._executable(*held))
        except Exception as error:  # the device, a library or a kernel may refuse what it likes
            self._refuse(f"it could not be recorded as a CUDA graph ({first_line(error)})")
            return
        owned = {value.untyped_storage()._cdata for value in held if isinstance(value, Tensor)}
        if any(isinstance(value, Tensor) and value.untyped_storage()._cdata in owned for value in outputs):
            self._refuse(_SHARED)
            return
        self._inputs, self._outputs = held, outputs

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self._tell(f"{reason}: calls run one by one")


def why_not(program: Program, capture: Callable[[torch.device], Capture] | None = None) -> str | None:
    """Why the calls of a program cannot be recorded; None where they can. ``capture`` is given where something else
    than a GPU records."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    devices = {value.device for value in values if isinstance(value, Tensor)}
    on_gpu = any(device.type == "cuda" for device in devices)
    if capture is None and not on_gpu:
        return "the model is on the CPU, which has no CUDA graphs"
    if collective_calls(program.graph):
        return "it exchanges tensors between ranks"
    if program.reads_layout:
        return "the model reads how its inputs lie in memory, and a graph has buffers of its own for them"
    if len(devices) > 1:
        return f"it is on several devices ({', '.join(sorted(map(str, devices)))})"
    for value in values:
        if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            return "its sizes are symbolic, and a graph holds for one shape"
    return None


def graphed(
    program: Program,
    executable: Run,
    tell: Callable[[str], None],
    capture: Callable[[torch.device], Capture] | None = None,
) -> Run:
    """The executable as a CUDA graph; itself where that cannot be, which ``tell`` is told."""
    reason = why_not(program, capture)
    if reason is not None:
        tell(f"{reason}: calls run one by one")
        return executable
    values = (node.meta.get("val") for node in program.graph.nodes)
    device = next(value.device for value in values if isinstance(value, Tensor))
    return Graphed(executable, (capture or GpuCapture)(device), tell)


def copies(outputs: Sequence[Any]) -> list[Any]:
    """Outputs in memory of their own; those that shared memory share that of the copy."""
    storages = [value.untyped_storage()._cdata if isinstance(value, Tensor) else None for value in outputs]
    whole: dict[Any, torch.UntypedStorage] = {}
    made: list[Any] = []
    for value, storage in zip(outputs, storages, strict=True):
        if not isinstance(value, Tensor):
            made.append(value)
        elif storages.count(storage) == 1:
            made.append(value.clone())
        else:
            if storage not in whole:
                whole[storage] = value.untyped_storage().clone()
            made.append(value.new_empty(0).set_(whole[storage], value.storage_offset(), value.shape, value.stride()))
    return made


def _alike(held: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether a call is one that was recorded: same shapes, types and devices of tensors, same numbers."""
    if len(held) != len(given):
        return False
    for one, other in zip(held, given, strict=True):
        if isinstance(one, Tensor):
            if not isinstance(other, Tensor) or (one.shape, one.dtype, one.device) != (
                other.shape,
                other.dtype,
                other.device,
            ):
                return False
        elif isinstance(other, Tensor) or type(one) is not type(other) or one != other:
            return False
    return True
