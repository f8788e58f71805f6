"""Tiles of attention kernels: the default ones, which build without spilling registers on every target
(``bench.aot``), and those that are tried beside them where a device is at hand.

The defaults are chosen by what the compiler says of registers and shared memory, not by time; tuning records replace
them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.mask_operands import mask_operands

Config = tuple[int, int, int, int]

#: Architectures that kernels are built for ahead of time.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Architectures with tiles of their own: consumer Blackwell has the matrix unit and the shared memory of sm_80's kin,
#: whose kernels must stay below 99 KiB.
_TILED = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
_AS = {"sm_120": "sm_80"}
_SMALLEST_TILE = 16  # what a matrix product takes

# Rows of queries and keys of a tile, warps, stages, by the width of a head in registers. "pairs": something is read for
# each pair of a query and a key (a bias, a dense mask, bits of a tree), which takes registers of its own.
_PREFILL_FP32 = {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)}
_PREFILL: dict[str, dict[int, Config]] = {
    "sm_80": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
    "sm_90": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
    "sm_100": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
    "gfx942": {64: (128, 64, 4, 1), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1), 512: (32, 16, 8, 1)},
}
_PREFILL_PAIRS: dict[str, dict[int, Config]] = {
    "sm_80": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1), 512: (32, 16, 8, 1)},
    "sm_90": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1), 512: (32, 16, 8, 1)},
    "sm_100": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1), 512: (32, 16, 8, 1)},
    "gfx942": {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 4, 1), 512: (32, 16, 8, 1)},
}
_SCORES_FP32 = {64: (64, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)}
_SCORES = _PREFILL_PAIRS | {"sm_80": _PREFILL_PAIRS["sm_80"] | {256: (32, 16, 8, 1)}}
_DECODE_FP32 = {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)}
_DECODE: dict[str, dict[int, Config]] = {
    "sm_80": {64: (32, 64, 4, 3), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2), 512: (16, 32, 4, 1)},
    "sm_90": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (32, 32, 4, 2), 512: (16, 32, 4, 1)},
    "sm_100": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (32, 32, 4, 2), 512: (16, 32, 4, 1)},
    "gfx942": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (32, 32, 4, 2), 512: (16, 32, 4, 1)},
}
_DECODE_PAIRS: dict[str, dict[int, Config]] = {
    "sm_80": {64: (32, 64, 4, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 2), 512: (16, 32, 8, 1)},
    "sm_90": {64: (64, 64, 8, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 2), 512: (16, 32, 8, 1)},
    "sm_100": {64: (64, 64, 8, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 2), 512: (16, 32, 8, 1)},
    "gfx942": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (32, 32, 4, 2), 512: (16, 32, 4, 1)},
}


def padded(dim: int) -> int:
    """The width of a head in registers: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def prefill_configs(spec: AttentionSpec) -> dict[str, Config]:
    """Queries and keys of a tile, warps and stages, for each architecture."""
    return _chosen(spec, _PREFILL_FP32, _PREFILL_PAIRS if _takes_more(spec) else _PREFILL)


def decode_configs(spec: AttentionSpec) -> dict[str, Config]:
    """Rows (at most) and keys of a tile, warps and stages, for each architecture."""
    return _chosen(spec, _DECODE_FP32, _DECODE_PAIRS if _takes_more(spec) else _DECODE)


def score_configs(spec: AttentionSpec) -> dict[str, Config]:
    """Queries and keys of a tile, warps and stages of the kernels that look at scores alone. Their exponentials beside
    a wide tile of keys take the registers that values would."""
    return _chosen(replace(spec, value_dim=spec.head_dim), _SCORES_FP32, _SCORES)


def topk_configs(spec: AttentionSpec, kept: int) -> dict[str, Config]:
    """The same of the kernel that keeps the highest keys of each row, which are as many registers."""
    keys = max(kept, 32 if padded(spec.head_dim) > 128 else 64)
    return dict.fromkeys(_TILED, (_SMALLEST_TILE, keys, 8, 1))


def combine_configs(value_dim: int) -> dict[str, tuple[int, int, int]]:
    """Rows of a program, warps and stages of the kernels that merge parts."""
    rows = 16 if padded(value_dim) <= 256 else 4
    return dict.fromkeys(_TILED, (rows, 4, 1))


def neighbours(config: Config) -> list[Config]:
    """A few tiles near ``config``: a deeper pipeline, other numbers of warps, fewer keys at a time. Each is compiled to
    be measured, which takes seconds; not all of them fit a device."""
    rows, keys, warps, stages = config
    near = [
        (rows, keys, warps, stages + 1),
        (rows, keys, 4 if warps == 8 else 8, stages),
        (rows, keys // 2, warps, stages + 1),
    ]
    return [found for found in near if min(found[:2]) >= _SMALLEST_TILE]


def _chosen(spec: AttentionSpec, fp32: dict[int, Config], half: dict[str, dict[int, Config]]) -> dict[str, Config]:
    width = max(64, padded(spec.head_dim), padded(spec.value_dim))
    if spec.dtype == torch.float32:
        return dict.fromkeys(_TILED, fp32[width])
    return {arch: half[_AS.get(arch, arch)][width] for arch in _TILED}


def _takes_more(spec: AttentionSpec) -> bool:
    """Whether something is read for each pair, or the weight is long to compute (an error function)."""
    if spec.bias != "none" or spec.weight == "gelu":
        return True
    return any(mask.reads & {"pairs", "bits"} for mask in mask_operands([spec.predicate]))
