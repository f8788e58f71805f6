"""Default tiles of row-wise kernels: what builds without spilling registers on every target (``bench.aot``).

Untuned: chosen by what the compiler says of registers, not by time. Tuning records replace them.
"""

from __future__ import annotations

from regraft.codegen.triton.attention_configs import ARCHS

#: Rows with more columns than this are gone through in chunks.
LONGEST_WHOLE = 8192
_TILE = 4096  # numbers of a value that a program holds
_CHUNK = 2048


def whole_configs(columns: int) -> dict[str, tuple[int, ...]]:
    """Rows of a program, warps and stages, where rows are held whole; ``columns`` of the widest piece."""
    padded = 1 << (columns - 1).bit_length()
    rows = min(32, max(1, _TILE // padded // 2))
    warps = min(16, max(4, rows * padded // 512))
    return {arch: (rows, warps if arch.startswith("sm_") else min(8, warps), 1) for arch in ARCHS}


def chunk_configs() -> dict[str, tuple[int, ...]]:
    """Rows, columns of a chunk, warps and stages, where rows are gone through in chunks."""
    return {arch: (1, _CHUNK, 8 if arch.startswith("sm_") else 4, 1) for arch in ARCHS}
