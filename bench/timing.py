"""Interleaved timing of several callables, and the record that a bench leaves behind.

On a shared machine a wall-clock time means little by itself. Callables are therefore run in turn, round after
round, so that a slow spell hits all of them, and what counts is the ratio of their medians.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

#: Seconds before each turn, for the threads of the one before to go to sleep; an unmeasured call then wakes ours.
_SETTLE = 0.05
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "onnxruntime", "openvino", "onnxscript", "numpy")


@dataclass(frozen=True)
class Timing:
    """The times of one callable, in milliseconds, in the order of the rounds."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return median(self.milliseconds)


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    warm_up: int = 3,
    shortest: float = 0.02,
    settle: float = _SETTLE,
) -> dict[str, Timing]:
    """Time every callable once a round, in turn, and return its times.

    Short callables are repeated within a round until it lasts about `shortest` seconds. The order rotates
    from round to round, because the one that follows a large model finds the caches cold. Callables that all use one
    pool of threads need no time to `settle`.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        for _ in range(warm_up):
            call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(shortest / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            call = calls[name]
            time.sleep(settle)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _portable(argument: str) -> str:
    """An argument as it can stand in a record: of a path on this machine, the name alone."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def write_record(name: str, results: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write `results` with the device, the versions and the command behind them; return the file's path."""
    target = path or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "command": f"python -m bench.{name} {shlex.join(map(_portable, sys.argv[1:]))}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device(),
        "versions": versions(),
        **results,
    }
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return target


def device() -> dict[str, Any]:
    """Name the processor, its vector instructions and the threads that torch uses, and the GPU where there is one."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Collect the versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
