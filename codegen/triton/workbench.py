"""Where kernels are measured: a device of the target, and its clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from regraft.codegen.triton.archs import arch_of, target_arch


@dataclass(frozen=True)
class Workbench:
    """A device to measure on. ``arch`` is its architecture ("sm_90", "gfx942"), ``name`` its marketed name;
    ``seconds(name, run)`` makes one call of the candidate ``name`` and says how long it took."""

    device: torch.device
    arch: str
    name: str
    seconds: Callable[[str, Callable[[], Any]], float]


def found_workbench(target: str) -> Workbench | None:
    """The current GPU, where there is one and it is of the target's architecture."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    arch = arch_of(device)
    if target_arch(target) not in (None, arch):
        return None
    return Workbench(device, arch, torch.cuda.get_device_name(device), _gpu_seconds)


def _gpu_seconds(name: str, run: Callable[[], Any]) -> float:
    """One call by the device's own clock. Nothing is flushed: operands come from the call before, as in a model."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
