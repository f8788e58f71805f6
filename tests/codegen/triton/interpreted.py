"""Emitted kernels run by Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets, for the whole process, and what is interpreted cannot be
built: so the process that runs the tests does not.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from regraft.codegen.triton.emit import Kernel

#: Runs a kernel's launcher on CPU tensors: kernel, operands by name, and options of the launcher.
Run = Callable[..., Any]


def interpreter() -> ProcessPoolExecutor:
    """A process that interprets."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def runner(pool: ProcessPoolExecutor) -> Run:
    """What runs kernels in that process; tensors go there and back with their strides."""

    def run(kernel: Kernel, operands: dict[str, Any], **options: Any) -> Any:
        given = [operands[name] for name in kernel.operands]
        return _read(pool.submit(_launch, kernel, _written(given), options).result())

    return run


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy tells of infinities that a GPU does not tell of


def _launch(kernel: Kernel, operands: bytes, options: dict[str, Any]) -> bytes:
    from regraft.codegen.triton.load import load_kernel

    return _written(load_kernel(kernel).launch(*_read(operands), **options))


def _written(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _read(data: bytes) -> Any:
    return torch.load(io.BytesIO(data))
