"""Default tiles of matrix products: what builds without spilling registers on every target (``bench.aot``).

Untuned: chosen by what the compiler says of registers and shared memory, not by time. Tuning records replace them.
"""

from __future__ import annotations

import torch

from regraft.codegen.triton.attention_configs import ARCHS

#: Up to this many rows a product is bound by reading its weights: small tiles of rows, long ones of the summed dim.
FEW_ROWS = 64


def product_configs(dtype: torch.dtype, accumulators: int, prologue: bool) -> dict[str, tuple[int, ...]]:
    """Rows, columns and summed numbers of a tile, warps and stages, for many rows."""
    return {arch: _many(arch, dtype, accumulators, prologue) for arch in ARCHS}


def _many(arch: str, dtype: torch.dtype, accumulators: int, prologue: bool) -> tuple[int, ...]:
    if dtype == torch.float32:
        return (64, 64, 16, 4, 2) if accumulators == 1 else (32, 32, 16, 4, 2)
    columns = 128 // min(2, accumulators)
    if prologue:
        return (64, columns, 64, 8, 2) if arch.startswith("sm_") else (64, columns, 32, 8, 2)
    if arch == "sm_80":
        return (128, columns, 32, 8, 3)
    return (128, columns, 64, 8, 3) if arch.startswith("sm_") else (128, columns, 32, 8, 2)


def few_configs(dtype: torch.dtype, accumulators: int) -> dict[str, tuple[int, ...]]:
    """The same for few rows, at most ``FEW_ROWS``."""
    columns = 64 // min(2, accumulators)
    if dtype == torch.float32:
        return {arch: (16, columns, 32, 4, 2) for arch in ARCHS}
    return {arch: (16, columns, 128, 4, 4 if arch.startswith("sm_") else 2) for arch in ARCHS}
