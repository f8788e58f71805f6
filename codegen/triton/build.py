"""Building an emitted kernel ahead of time, without a GPU: its binary, and what the compiler says that it takes.

A build holds for operands as models have them: contiguous along the last dim, pointers and strides that 16 divides.
Triton must not be under ``TRITON_INTERPRET`` in the process that builds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.codegen.triton.archs import line_for, number_of
from regraft.codegen.triton.emit import Entry, Kernel
from regraft.codegen.triton.load import load_kernel

_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
_AMD = re.compile(
    r"^\s*\.(vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", re.M
)


class BuildError(RuntimeError):
    """A kernel that the compiler refuses for a target; the message is the compiler's first line."""


@dataclass(frozen=True)
class Resources:
    """What one program takes: registers a thread, bytes of shared memory, bytes a thread keeps in memory because
    registers do not suffice, and how often the matrix unit of the target is named (wgmma on sm_90)."""

    arch: str
    config: tuple[int, ...]
    registers: int
    shared: int
    spilled: int
    matrix_instructions: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Build:
    """An entry's binary for one architecture: a cubin with its PTX, or an AMD code object with its assembly."""

    entry: str
    binary: bytes
    extension: str
    assembly: str
    assembly_extension: str
    resources: Resources


def build(kernel: Kernel, entry: Entry, arch: str, config: tuple[int, ...] | None = None) -> Build:
    """Compile an entry for "sm_90", "gfx942", …, by default with its own tiles; raises ``BuildError``."""
    import triton
    from triton.compiler import ASTSource

    config = config or _config(entry, arch)
    *sizes, warps, stages = config
    function = getattr(load_kernel(kernel), entry.name)
    constants: dict[str, Any] = dict(zip(entry.sizes, sizes, strict=True))
    constants |= {parameter.name: parameter.value for parameter in entry.parameters if parameter.value is not None}
    signature = {parameter.name: parameter.kind for parameter in entry.parameters}
    signature |= dict.fromkeys(constants, "constexpr")
    names = [parameter.name for parameter in entry.parameters]
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, parameter in enumerate(entry.parameters)
        if parameter.value is None and parameter.aligned
    }
    assert list(function.arg_names[: len(names)]) == names, "parameters out of order"
    try:
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=gpu_target(arch),
            options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        )
    except Exception as error:  # the compiler raises what it likes
        raise BuildError(f"{entry.name} for {arch} with {config}: {str(error).strip().splitlines()[0]}") from error
    extension, text = ("cubin", "ptx") if arch.startswith("sm_") else ("hsaco", "amdgcn")
    assembly = compiled.asm[text]
    counted = _nvidia(compiled.asm[extension], assembly) if extension == "cubin" else _amd(assembly)
    resources = Resources(arch, config, counted[0], compiled.metadata.shared, counted[1], counted[2])
    return Build(entry.name, compiled.asm[extension], extension, assembly, text, resources)


def build_all(jobs: Sequence[tuple[Kernel, Entry, str]], executor: Executor) -> list[Build | BuildError]:
    """Builds of entries for architectures, in order; a refusal takes its build's place."""
    return [future.result() for future in [executor.submit(try_build, *job) for job in jobs]]


def try_build(kernel: Kernel, entry: Entry, arch: str) -> Build | BuildError:
    """``build``, whose refusal is returned instead of raised: processes give it back."""
    try:
        return build(kernel, entry, arch)
    except BuildError as error:
        return BuildError(str(error))


def _config(entry: Entry, arch: str) -> tuple[int, ...]:
    """The tiles of an architecture."""
    found = line_for(entry.configs, arch)
    if found is None:
        raise BuildError(f"{entry.name} has no tiles for {arch!r}; it has for {', '.join(entry.configs)}")
    return found


def gpu_target(arch: str) -> Any:
    """Triton's target for "sm_90", "gfx942", …; raises ``ValueError`` for any other word."""
    from triton.backends.compiler import GPUTarget

    number = number_of(arch)
    if number is not None:
        return GPUTarget("cuda", number, 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"the architecture is {arch!r}, and sm_80, sm_90, sm_100, gfx942 … are known")


def _nvidia(cubin: bytes, ptx: str) -> tuple[int, int, dict[str, int]]:
    """Registers, spilled bytes and matrix instructions of a cubin, as NVIDIA's cuobjdump tells."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in _RESOURCE.findall(said)}
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in _MATRIX.items()}
    return found["REG"], found["STACK"] + found["LOCAL"], {name: count for name, count in counts.items() if count}


_MATRIX = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


def _amd(assembly: str) -> tuple[int, int, dict[str, int]]:
    found = {name: int(number) for name, number in _AMD.findall(assembly)}
    spilled = 4 * found.get("vgpr_spill_count", 0) + found.get("private_segment_fixed_size", 0)
    count = len(re.findall(r"\bv_mfma_", assembly))
    return found["vgpr_count"], spilled, {"mfma": count} if count else {}
