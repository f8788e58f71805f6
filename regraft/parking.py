"""Letting go of a model: its weights are parked in a temporary file until the compiled outputs were compared.

A weight that was packed is not needed any more, unless the comparison fails: then the model must be what it was. So it
is neither kept in memory beside its packed copy nor lost: it is written to a file without a name, and the model's
tensor is a view of that file, which takes no memory until somebody reads it. One that is a view of a file already, as
of a checkpoint that was mapped, needs no other.
"""

from __future__ import annotations

import mmap
import tempfile
from collections import Counter
from collections.abc import Container
from typing import IO, Any

import torch
from torch import Tensor, nn

from regraft.ir.memory import give_back, page_out

_WORTH_A_WRITE = 1 << 20  # bytes of a weight


class Parking:
    """Parks tensors of ``model``; every other tensor stays as it is.

    A tensor keeps its identity, values, shape and strides. Only tensors that are alone in their memory are parked: two
    parameters that share theirs must go on sharing it. ``refused`` says why nothing more is parked (a full disk…).
    """

    def __init__(self, model: nn.Module) -> None:
        own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        alone = Counter(_memory(tensor) for tensor in own.values() if _is_plain(tensor))
        self._own = {key: t for key, t in own.items() if _is_plain(t) and alone[_memory(t)] == 1}
        self._parked: dict[int, Tensor] = {}
        self._file: IO[bytes] | None = None
        self.refused = ""

    def park(self, tensor: Tensor) -> None:
        """Let the memory of ``tensor`` go, if it is the model's and large. Where it cannot be written it stays."""
        if page_out(tensor) or self.refused or id(tensor) not in self._own or id(tensor) in self._parked:
            return
        try:
            mapped = self._written(tensor)
        except OSError as error:
            self.refused = f"weights stay in memory until the outputs are compared: {error.strerror or error}"
            return
        with torch.no_grad():
            tensor.data = mapped
        self._parked[id(tensor)] = tensor
        give_back()

    def take_back(self) -> None:
        """Bring everything back into memory: the model is what it was."""
        with torch.no_grad():
            for tensor in self._parked.values():
                tensor.data = torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor.data)
        self.close()

    def close(self) -> None:
        """Forget the file. It goes with the last tensor that is a view of it."""
        self._parked.clear()
        self._own.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _written(self, tensor: Tensor) -> Tensor:
        """A view of the file with what ``tensor`` holds."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as its views)
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
        start = -(-self._file.seek(0, 2) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(raw.numpy().data)
        self._file.flush()
        view = mmap.mmap(self._file.fileno(), raw.numel(), access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(view, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def empty(model: nn.Module, kept: Container[int]) -> None:
    """Replace every parameter and buffer of ``model`` by one without numbers, but those whose identity is ``kept``."""
    for part in model.modules():
        both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in both:
            for name, value in held.items():
                if value is not None and id(value) not in kept:
                    held[name] = _empty_like(value)


def _empty_like(value: Tensor) -> Tensor:
    none = torch.empty(0, dtype=value.dtype, device=value.device)
    return nn.Parameter(none, requires_grad=False) if isinstance(value, nn.Parameter) else none


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is large, on the CPU, and all of its memory by itself."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_inference() or tensor.is_neg() or tensor.is_conj():
        return False  # memory that cannot be exchanged, or does not hold the numbers by itself
    return tensor.nbytes >= _WORTH_A_WRITE and tensor.untyped_storage().nbytes() == tensor.nbytes
