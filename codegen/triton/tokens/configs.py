"""Default tiles of token kernels: what builds without spilling registers on every target (``bench.aot``).

Untuned: chosen by what the compiler says of registers and shared memory, not by time. Tuning records replace them.
"""

from __future__ import annotations

import torch

from regraft.codegen.triton.attention_configs import ARCHS

#: The widest tokens that a merge holds whole.
WIDEST = 8192

Config = tuple[int, ...]

_FP32: dict[str, Config] = {"sm_80": (16, 16, 32, 8, 1), "sm_90": (16, 32, 32, 4, 1)}
_FP16: dict[str, Config] = {"sm_100": (64, 64, 32, 8, 1)}
_BF16: dict[str, Config] = {**_FP16, "sm_80": (64, 32, 32, 8, 2)}


def plan_configs(dtype: torch.dtype) -> dict[str, Config]:
    """Tokens of two tiles that are compared, numbers of a token, warps and stages."""
    if dtype == torch.float32:
        return dict.fromkeys(ARCHS, (16, 16, 32, 4, 1)) | _FP32
    return dict.fromkeys(ARCHS, (64, 64, 32, 8, 2)) | (_BF16 if dtype == torch.bfloat16 else _FP16)


def merge_configs(width: int) -> dict[str, Config]:
    """Tokens that a program looks through together for those that come to its own, warps and stages."""
    warps = min(8, max(1, padded(width) // 256))
    return dict.fromkeys(ARCHS, (128, warps, 1))


def unmerge_configs(width: int) -> dict[str, Config]:
    """Rows and columns of a program, warps and stages."""
    columns = min(1024, padded(width))
    return dict.fromkeys(ARCHS, (max(1, 2048 // columns), columns, 4, 1))


def padded(width: int) -> int:
    """The next power of two."""
    return 1 << (width - 1).bit_length()
