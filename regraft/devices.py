"""The device that an artifact runs on, and moving its program there: weights, constants, and devices that its graph
names.

An artifact for a GPU may come from a machine without one: then everything in it is on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.triton.archs import arch_of, target_arch
from regraft.errors import TargetError
from regraft.ir.program import Program

Place = Callable[[torch.device], torch.device]


def running_device(target: str, device: str | torch.device | None) -> torch.device:
    """Where an artifact for ``target`` runs: on ``device`` if one is given, else on the GPU that is here if it is for
    one, else on the CPU. Raises ``TargetError`` for a device that is not here or that it is not for."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if target != "cpu" and gpus else torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise TargetError(f'device={device!r} was given; give "cpu", "cuda" or "cuda:1"') from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise TargetError(f'device={str(wanted)!r} was given, and compiled models run on "cpu" and "cuda"')
    if target == "cpu":
        raise TargetError(
            f"device={str(wanted)!r} was given, and the artifact was compiled for the CPU; compile the model with "
            "target='cuda', or leave device out"
        )
    if not gpus:
        raise TargetError(
            f"device={str(wanted)!r} was given, and no GPU is here; leave device out to run its kernels as their "
            "definitions on the CPU"
        )
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= gpus:
        raise TargetError(f"device={str(wanted)!r} was given, and {gpus} GPUs are here; give one of them")
    return torch.device("cuda", index)


def what_differs(target: str, device: torch.device) -> str | None:
    """What to tell of a device that is not the one compiled for; None where it is."""
    if target == "cpu":
        return None
    if device.type == "cpu":
        return f"compiled for {target!r} and loaded on the CPU: its kernels run as their definitions"
    wanted, found = target_arch(target), arch_of(device)
    if wanted in (None, found):
        return None
    return f"compiled for {wanted}, and the GPU here is {found}: its kernels are built for {found} when they first run"


def device_of(program: Program) -> torch.device:
    """The device of a program's inputs and weights: where these are on several, not the CPU."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    devices = {value.device for value in values if isinstance(value, Tensor)}
    return next((device for device in sorted(devices, key=str) if device.type != "cpu"), torch.device("cpu"))


def move(program: Program, device: torch.device) -> None:
    """Put a program onto ``device``, in place. What it names beside its own device (a table that stays on the CPU of a
    program on a GPU) keeps its place. Tied weights stay tied."""
    own = device_of(program)

    def place(found: torch.device) -> torch.device:
        return device if found.type == own.type else found

    _move_weights(program, place, device)
    inputs = zip(program.example, program.user_inputs(), strict=True)
    program.example = [
        value.to(place(node.meta["val"].device)) if isinstance(value, Tensor) else value for value, node in inputs
    ]
    for node in program.graph.nodes:
        if node.op == "call_function":
            if own.type == "cpu" and _makes_on_default_device(node):
                node.kwargs = {**node.kwargs, "device": device}
            node.args, node.kwargs = _renamed(node.args, place), _renamed(node.kwargs, place)
        node.meta["val"] = _fake_moved(program, node.meta.get("val"), place)
    program.module.recompile()


def _move_weights(program: Program, place: Place, device: torch.device) -> None:
    places = {
        program.weight_name(node): place(node.meta["val"].device)
        for node in program.weight_placeholders()
        if isinstance(node.meta.get("val"), Tensor)
    }
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for name, tensor in program.weights.originals.items():
        there = places.get(name, device)
        key = (id(tensor), there)
        if key not in moved:
            moved[key] = _tensor_moved(tensor, there)
        program.weights.originals[name] = moved[key]


def _tensor_moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, in its order of memory; what is repeated without memory of its own stays so."""
    sizes = tensor.shape
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and sizes[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.to(device).expand(sizes)


def _makes_on_default_device(node: fx.Node) -> bool:
    """Whether a call makes a tensor from numbers, and does not say where."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or any(isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes):
        return False
    named = [place for place, argument in enumerate(schema.arguments) if argument.name == "device"]
    return bool(named) and node.kwargs.get("device") is None and len(node.args) <= named[0]


def _renamed(value: Any, place: Place) -> Any:
    """Arguments with the devices in them at their new places."""
    if isinstance(value, torch.device):
        return place(value)
    if isinstance(value, (list, tuple)):
        items = [_renamed(item, place) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: _renamed(item, place) for key, item in value.items()}
    return value


def _fake_moved(program: Program, value: Any, place: Place) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_fake_moved(program, item, place) for item in value)
    if not isinstance(value, Tensor) or place(value.device) == value.device:
        return value
    mode = program.fake_mode
    with mode, nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=place(value.device))
