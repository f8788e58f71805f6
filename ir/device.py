"""What a device can do at best: floating-point operations and bytes a second, for the cost model's roofline.

Accelerators come from a table of the makers' data sheets (dense rates, no structured sparsity). The local CPU
is measured once by a matrix product and a copy, and the result is kept in ``devices.json`` in the cache
folder: ``$REGRAFT_CACHE_DIR`` when that is set, else ``$XDG_CACHE_HOME/regraft``, else ``~/.cache/regraft``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_REPEATS = 3
_MATRIX = {torch.float32: 768, torch.bfloat16: 192}  # bf16 is emulated, and slow, on many processors
_COPY_ELEMENTS = 1 << 24  # 64 MiB of fp32: larger than the last-level cache of one core's share


@dataclass(frozen=True)
class Device:
    """Peak rates of one device. ``flops`` maps an element type's name ("bfloat16") to operations a second."""

    name: str
    flops: Mapping[str, float]
    bytes_per_second: float
    source: str

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second in ``dtype``; fp32's rate for a type that the table does not name."""
        return self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])

    def ridge(self, dtype: torch.dtype) -> float:
        """Operations a byte at which the limit changes from bandwidth to arithmetic."""
        return self.peak(dtype) / self.bytes_per_second


def _rates(float64: float, float32: float, half: float, eight_bit: float | None = None) -> dict[str, float]:
    tera = {"float64": float64, "float32": float32, "float16": half, "bfloat16": half}
    if eight_bit is not None:
        tera |= {"float8_e4m3fn": eight_bit, "float8_e5m2": eight_bit, "int8": eight_bit}
    return {name: rate * 1e12 for name, rate in tera.items()}


#: Accelerators by name. fp32 is the rate outside the matrix units: PyTorch does not use TF32 unless told to.
DEVICES: dict[str, Device] = {
    "H200": Device("H200", _rates(34, 67, 989.5, 1979), 4.8e12, "NVIDIA H200 data sheet, SXM, dense"),
    "H100": Device("H100", _rates(34, 67, 989.5, 1979), 3.35e12, "NVIDIA H100 data sheet, SXM, dense"),
    "A100": Device(
        "A100",
        _rates(9.7, 19.5, 312) | {"int8": 624e12},
        2.039e12,
        "NVIDIA A100 data sheet, 80 GB SXM, dense",
    ),
    "B200": Device("B200", _rates(37, 75, 2250, 4500), 8e12, "NVIDIA HGX B200 data sheet, one of eight, dense"),
    "MI300X": Device("MI300X", _rates(81.7, 163.4, 1307.4, 2614.9), 5.3e12, "AMD Instinct MI300X data sheet, dense"),
}

_ARCHITECTURES = {"sm_80": "A100", "sm_90": "H100", "sm_90a": "H100", "sm_100": "B200", "gfx942": "MI300X"}


def find_device(target: str) -> Device:
    """The device that a target means: "cpu", "cuda", "cuda:sm_90", "hip:gfx942" or a name of the table.

    "cuda" is the accelerator of this machine, and "cpu" its processor, measured. Raises ``ValueError`` for a
    target that is not known.
    """
    if target == "cpu":
        return local_cpu()
    named = {name.lower(): name for name in DEVICES}.get(target.lower())
    architecture = target.rpartition(":")[2]
    if named is None:
        named = _ARCHITECTURES.get(architecture)
    if named is None and re.fullmatch(r"cuda(:\d+)?", target) and torch.cuda.is_available():
        marketed = torch.cuda.get_device_name()
        named = next((name for name in DEVICES if name in marketed), None)
    if named is None:
        known = ", ".join(["cpu", *DEVICES, *(f"cuda:{name}" for name in _ARCHITECTURES)])
        raise ValueError(f"no rates are known for device {target!r}; give one of: {known}")
    return DEVICES[named]


def rated_device(target: str) -> Device:
    """``find_device``, and this machine's processor where no rates are known: a model lowered for a GPU of no table, or
    for one that is not here."""
    try:
        return find_device(target)
    except ValueError:
        return local_cpu()


def local_cpu(refresh: bool = False) -> Device:
    """The processor of this machine at torch's present number of threads, measured on first use.

    ``refresh`` measures again. A cache that cannot be read or written only costs a new measurement.
    """
    key = f"{processor_name()} | {torch.get_num_threads()} threads | torch {torch.__version__}"
    held = _read_cache()
    if not refresh and key in held:
        try:
            return _from_json(held[key])
        except (KeyError, TypeError, ValueError, AttributeError):
            pass  # an entry of another form is measured anew and overwritten
    device = _measure()
    _write_cache({**held, key: asdict(device)})
    return device


def cache_folder() -> Path:
    """Where what was measured or built on this machine is kept; see the module's description."""
    override = os.environ.get("REGRAFT_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(override) if override else Path(base) / "regraft"


def cache_file() -> Path:
    """Where measured devices are kept."""
    return cache_folder() / "devices.json"


def processor_name() -> str:
    """The processor's marketed name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def _measure() -> Device:
    flops = {str(dtype).removeprefix("torch."): _matmul_rate(dtype, size) for dtype, size in _MATRIX.items()}
    flops["float64"] = flops["float32"] / 2  # half the vector lanes
    flops["float16"] = flops["bfloat16"]
    return Device(
        name=f"{processor_name()}, {torch.get_num_threads()} threads",
        flops=flops,
        bytes_per_second=_copy_rate(),
        source="measured: product of two square matrices in fp32 and in bf16, copy of 64 MiB",
    )


def _matmul_rate(dtype: torch.dtype, size: int) -> float:
    left = torch.ones(size, size, dtype=dtype)
    out = torch.empty_like(left)
    return 2.0 * size**3 / _shortest(lambda: torch.mm(left, left, out=out))


def _copy_rate() -> float:
    source = torch.ones(_COPY_ELEMENTS, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _shortest(lambda: target.copy_(source))


def _shortest(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)


def _from_json(data: Mapping[str, Any]) -> Device:
    rates = {str(name): float(rate) for name, rate in data["flops"].items()}
    device = Device(str(data["name"]), rates, float(data["bytes_per_second"]), str(data["source"]))
    if "float32" not in rates or min(device.bytes_per_second, *rates.values()) <= 0:
        raise ValueError("rates must be positive")
    return device


def _read_cache() -> dict[str, Any]:
    try:
        held = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _write_cache(held: Mapping[str, Any]) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(held, stream, indent=1)
        Path(temporary).replace(path)
    except OSError:
        return  # a read-only home folder must not fail a compilation
