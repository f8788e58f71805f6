"""Default tiles of attention kernels: what builds without spilling registers on every target (``bench.aot``).

Untuned: chosen by what the compiler says of registers and shared memory, not by time. Tuning records replace them.
"""

from __future__ import annotations

import torch

#: Architectures that kernels are built for ahead of time.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def padded(dim: int) -> int:
    """The width of a head in registers: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def prefill_configs(dtype: torch.dtype, head_dim: int, value_dim: int) -> dict[str, tuple[int, int, int, int]]:
    """Queries and keys of a tile, warps and stages, for each architecture."""
    width = max(padded(head_dim), padded(value_dim))
    return {arch: _prefill(arch, dtype, width) for arch in ARCHS}


def _prefill(arch: str, dtype: torch.dtype, width: int) -> tuple[int, int, int, int]:
    if dtype == torch.float32:
        return (64, 32, 4, 2) if width <= 64 else (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    if width <= 64:
        return (128, 64, 4, 3) if arch.startswith("sm_") else (128, 64, 4, 1)
    if width <= 128:
        return (128, 64, 8, 2)
    if width <= 256:
        return (64, 32, 8, 2)
    return (32, 32, 8, 1)


def decode_configs(dtype: torch.dtype, head_dim: int, value_dim: int) -> dict[str, tuple[int, int, int, int]]:
    """Rows (at most) and keys of a tile, warps and stages, for each architecture."""
    width = max(padded(head_dim), padded(value_dim))
    return {arch: _decode(arch, dtype, width) for arch in ARCHS}


def _decode(arch: str, dtype: torch.dtype, width: int) -> tuple[int, int, int, int]:
    if dtype == torch.float32:
        return (32, 32, 4, 2) if width <= 128 else (16, 16, 4, 1)
    if width <= 128:
        return (64, 64, 4, 3 if arch.startswith("sm_") else 1)
    return (32, 32, 4, 2) if width <= 256 else (16, 32, 4, 1)


def combine_configs(rows: int) -> dict[str, tuple[int, int, int]]:
    """Rows of a program, warps and stages of the kernel that merges parts."""
    return dict.fromkeys(ARCHS, (rows, 4, 1))
