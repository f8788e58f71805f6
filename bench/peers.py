"""The peers of the bench: one small function each, from a case to a zero-argument callable.

A peer is free to fail (an operator that it lacks, an export that it refuses): the reason becomes its result.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from bench.models import Case

Call = Callable[[], Any]


@dataclass(frozen=True)
class Built:
    """What a peer made of a case: a callable with its compile seconds, or the reason why there is none."""

    name: str
    call: Call | None
    compile_seconds: float
    reason: str = ""
    drift: float = 0.0


def eager(case: Case) -> Call:
    """PyTorch without a compiler."""
    return _call(case.module, case)


def torch_compile(case: Case) -> Call:
    """`torch.compile` with its defaults."""
    torch._dynamo.reset()
    return _call(torch.compile(case.module, dynamic=False), case)


def torch_compile_max(case: Case) -> Call:
    """`torch.compile` with frozen weights and max-autotune, Inductor's fastest CPU setting."""
    torch._dynamo.reset()
    options: dict[str, str | int | bool | Callable[..., Any]] = {"freezing": True, "max_autotune": True}
    return _call(torch.compile(case.module, dynamic=False, options=options), case)


def onnxruntime(case: Case) -> Call:
    """ONNX Runtime on the model that `torch.onnx.export` writes, with torch's number of threads."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin while it runs, as they do by default, but not on, at the cost of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = _export_onnx(case, Path(folder))
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in _tensors(case)), strict=True))
    return lambda: session.run(None, feed)


def openvino(case: Case) -> Call:
    """OpenVINO on the torch module, or on its ONNX export where its PyTorch frontend refuses the module."""
    import openvino as runtime

    core = runtime.Core()
    # OpenVINO picks bf16 by itself on machines that have it; the comparison is in fp32.
    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    inputs = _tensors(case)
    try:
        with torch.no_grad():
            model = runtime.convert_model(torch.export.export(case.module, case.args, case.kwargs, strict=False))
        compiled = core.compile_model(model, "CPU", hints)
    except Exception:
        with tempfile.TemporaryDirectory() as folder:
            model = runtime.convert_model(str(_export_onnx(case, Path(folder))))
            compiled = core.compile_model(model, "CPU", hints)
    request = compiled.create_infer_request()
    feed = [tensor.numpy() for tensor in inputs]
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def regraft(case: Case) -> Call:
    """regraft's exact rewrites, captured at the first call as `torch.compile` does."""
    # Imported here so that the peers can be measured without regraft.
    from regraft import compile as regraft_compile

    return _call(regraft_compile(case.module), case)


def regraft_freed(case: Case) -> Call:
    """The same for the inputs of the case alone, where compiled code takes the place of the model's weights."""
    from regraft import compile as regraft_compile

    return _call(regraft_compile(case.module, case.args, case.kwargs, free_original=True), case)


PEERS: dict[str, Callable[[Case], Call]] = {
    "eager": eager,
    "torch.compile": torch_compile,
    "torch.compile max": torch_compile_max,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "regraft": regraft,
}
"""Every peer, regraft included, by the name that the table shows."""

FREED = "regraft freed"
"""What is measured for its memory alone: the case's module has no weights afterwards."""


def build(name: str, case: Case, compare: bool = True) -> Built:
    """Build one peer, run it once, and compare its output with eager's.

    The seconds cover everything up to the end of the first call, where `torch.compile` does its work.
    """
    start = time.perf_counter()
    try:
        with torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            call = regraft_freed(case) if name == FREED else PEERS[name](case)
            output = call()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        return Built(name, None, time.perf_counter() - start, reason)
    seconds = time.perf_counter() - start
    if not compare:
        return Built(name, call, seconds)
    with torch.no_grad():
        expected = case.module(*case.args, **case.kwargs)
    return Built(name, call, seconds, drift=_distance(output, expected))


def _call(function: Callable[..., Any], case: Case) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return function(*case.args, **case.kwargs)

    return run


def _tensors(case: Case) -> list[torch.Tensor]:
    return [value for value in (*case.args, *case.kwargs.values()) if isinstance(value, torch.Tensor)]


def _export_onnx(case: Case, folder: Path) -> Path:
    path = folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            case.module,
            case.args,
            str(path),
            kwargs=case.kwargs,
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    return path


def _distance(output: Any, expected: torch.Tensor) -> float:
    if isinstance(output, list | tuple):
        output = output[0]
    return float((torch.as_tensor(output) - expected).abs().max())
