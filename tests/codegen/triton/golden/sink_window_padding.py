"""Attention of many queries: one program a tile of them, over the tiles of keys that it sees.

Emitted by regraft: `regraft kernels` writes it again.

element  float32, head_dim 96, value_dim 64
mask     (prefix(4) & band(None,0) | band(-511,0)) & keys(0)
weights  exp, normaliser sum; a row without keys is mean
with     softcap
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPE = torch.float32
HEAD_DIM = tl.constexpr(96)
HEAD_DIM_PADDED = tl.constexpr(128)  # in registers only: what lies behind HEAD_DIM is loaded as 0
VALUE_DIM = tl.constexpr(64)
VALUE_DIM_PADDED = tl.constexpr(64)
PRECISION = tl.constexpr("ieee")  # of fp32 products
LOG2E = tl.constexpr(1.4426950408889634)

#: Queries and keys of a tile, warps, stages of the pipeline. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (32, 32, 8, 1),
    "sm_90": (32, 32, 8, 1),
    "sm_100": (32, 32, 8, 1),
    "sm_120": (32, 32, 8, 1),
    "gfx942": (32, 32, 8, 1),
}


@triton.jit
def interval_0(rows, query_length, key_length):
    """The keys that each row sees by band(-511,0): first, and one behind the last."""
    start = tl.zeros_like(rows)
    end = tl.zeros_like(rows) + key_length
    start = tl.maximum(start, rows - 511)
    end = tl.minimum(end, rows + 1)
    return start, tl.maximum(start, tl.minimum(end, key_length))


@triton.jit
def interval_1(rows, query_length, key_length):
    """The keys that each row sees by band(None,0) & prefix(4): first, and one behind the last."""
    start = tl.zeros_like(rows)
    end = tl.zeros_like(rows) + key_length
    end = tl.minimum(end, rows + 1)
    end = tl.minimum(end, 4)
    return start, tl.maximum(start, tl.minimum(end, key_length))


@triton.jit
def tile_bounds(start, end, key_length, BLOCK_N: tl.constexpr):
    """Tiles of keys that some row sees, [begin, finish), and among them those that every row sees whole."""
    seen = start < end
    begin = tl.min(tl.where(seen, start, key_length), 0) // BLOCK_N
    finish = tl.maximum(begin, tl.cdiv(tl.max(tl.where(seen, end, 0), 0), BLOCK_N))
    whole = tl.minimum(tl.maximum(tl.cdiv(tl.max(start, 0), BLOCK_N), begin), finish)
    whole_finish = tl.maximum(tl.minimum(tl.min(end, 0) // BLOCK_N, finish), whole)
    return begin, whole, whole_finish, finish


@triton.jit
def exchange(begin_0, whole_0, whole_finish_0, finish_0, begin_1, whole_1, whole_finish_1, finish_1):
    """Two groups of bounds, the one that begins first in front."""
    if begin_1 < begin_0:
        begin_0, begin_1 = begin_1, begin_0
        whole_0, whole_1 = whole_1, whole_0
        whole_finish_0, whole_finish_1 = whole_finish_1, whole_finish_0
        finish_0, finish_1 = finish_1, finish_0
    return begin_0, whole_0, whole_finish_0, finish_0, begin_1, whole_1, whole_finish_1, finish_1


@triton.jit
def test(rows, keys, inside, query_length, key_length, mask_0, mask_0_stride_place):
    """Whether a row sees a key, for each pair of a tile: `rows` is a column, `keys` a row."""
    mask_0_keys = tl.load(mask_0 + keys * mask_0_stride_place, mask=inside, other=0)
    return mask_0_keys != 0


@triton.jit
def step(
    acc,
    total,
    top,
    query,
    key_tile,
    value_tile,
    keys,
    inside,
    rows,
    query_length,
    key_length,
    scale,
    softcap,
    start_0,
    end_0,
    start_1,
    end_1,
    mask_0,
    mask_0_stride_place,
    MASKED: tl.constexpr,
):
    """One tile of keys: its scores, their weights, and what they add to the output and to its normaliser."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    if MASKED:
        key = tl.load(key_tile, mask=inside[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    else:
        key = tl.load(key_tile, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    scores = tl.dot(query, key, input_precision=PRECISION) * scale
    scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
    if MASKED:
        seen = (keys[None, :] >= start_0[:, None]) & (keys[None, :] < end_0[:, None])
        also = (keys[None, :] >= start_1[:, None]) & (keys[None, :] < end_1[:, None])
        seen |= also
        seen &= test(
            rows[:, None], keys[None, :], inside[None, :], query_length, key_length, mask_0, mask_0_stride_place
        )
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far
    weights = tl.math.exp2(scores * LOG2E - (shift * LOG2E)[:, None])
    decay = tl.math.exp2((top - shift) * LOG2E)
    total = total * decay + tl.sum(weights, 1)
    acc *= decay[:, None]
    if MASKED:
        value = tl.load(value_tile, mask=inside[:, None], other=0.0)
    else:
        value = tl.load(value_tile)
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, total, higher


@triton.jit(do_not_specialize=["query_length", "key_length", "heads", "group", "mask_0_stride_batch"])
def attention_prefill_c06fa6bb(
    query,
    key,
    value,
    out,
    mask_0,
    query_length,
    key_length,
    heads,
    group,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    query_stride_dim,
    key_stride_batch,
    key_stride_head,
    key_stride_row,
    key_stride_dim,
    value_stride_batch,
    value_stride_head,
    value_stride_row,
    value_stride_dim,
    out_stride_batch,
    out_stride_head,
    out_stride_row,
    out_stride_dim,
    mask_0_stride_batch,
    mask_0_stride_place,
    scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The output of one tile of queries of one head."""
    program = tl.program_id(0)
    tiles = tl.cdiv(query_length, BLOCK_M)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    # Under a causal mask the last queries see most keys: they start first.
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    places = first_row + tl.arange(0, BLOCK_M)
    rows = tl.minimum(places, query_length - 1)  # rows behind the end repeat the last, and are not stored
    dims = tl.arange(0, HEAD_DIM_PADDED)
    columns = tl.arange(0, VALUE_DIM_PADDED)
    lanes = tl.arange(0, BLOCK_N)

    query += batch * query_stride_batch + head * query_stride_head
    key += batch * key_stride_batch + head // group * key_stride_head
    value += batch * value_stride_batch + head // group * value_stride_head
    query_tile = query + rows.to(tl.int64)[:, None] * query_stride_row + dims[None, :] * query_stride_dim
    queries = tl.load(query_tile, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    key_tiles = key + dims[:, None] * key_stride_dim + lanes[None, :] * key_stride_row
    value_tiles = value + lanes[:, None] * value_stride_row + columns[None, :] * value_stride_dim
    mask_0 += batch * mask_0_stride_batch

    acc = tl.zeros((BLOCK_M, VALUE_DIM_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    start_0, end_0 = interval_0(rows, query_length, key_length)
    begin_0, whole_0, whole_finish_0, finish_0 = tile_bounds(start_0, end_0, key_length, BLOCK_N)
    start_1, end_1 = interval_1(rows, query_length, key_length)
    begin_1, whole_1, whole_finish_1, finish_1 = tile_bounds(start_1, end_1, key_length, BLOCK_N)
    # In order of their first tile; what an earlier range covers is taken from a later one.
    begin_0, whole_0, whole_finish_0, finish_0, begin_1, whole_1, whole_finish_1, finish_1 = exchange(
        begin_0, whole_0, whole_finish_0, finish_0, begin_1, whole_1, whole_finish_1, finish_1
    )
    begin_1 = tl.maximum(begin_1, finish_0)
    whole_1 = tl.maximum(whole_1, finish_0)
    whole_finish_1 = tl.maximum(whole_finish_1, finish_0)
    finish_1 = tl.maximum(finish_1, finish_0)

    # Tiles that some row sees.
    tiles_seen_0 = finish_0 - begin_0
    tiles_seen = tiles_seen_0 + finish_1 - begin_1
    for index in range(0, tiles_seen):
        tile = begin_0 + index
        tile = tl.where(index < tiles_seen_0, tile, begin_1 + index - tiles_seen_0)
        first = tile.to(tl.int64) * BLOCK_N
        key_tile = key_tiles + first * key_stride_row
        value_tile = value_tiles + first * value_stride_row
        keys = tile * BLOCK_N + lanes
        inside = keys < key_length
        acc, total, top = step(
            acc,
            total,
            top,
            queries,
            key_tile,
            value_tile,
            keys,
            inside,
            rows,
            query_length,
            key_length,
            scale,
            softcap,
            start_0,
            end_0,
            start_1,
            end_1,
            mask_0,
            mask_0_stride_place,
            MASKED=True,
        )

    empty = total == 0.0
    acc /= tl.where(empty, 1.0, total)[:, None]
    if tl.max(empty.to(tl.int32), 0) > 0:  # a number stood at every key of such a row: its weights are alike
        mean = tl.zeros((VALUE_DIM_PADDED,), tl.float32)
        for tile in range(0, tl.cdiv(key_length, BLOCK_N)):
            keys = tile * BLOCK_N + lanes
            inside = keys < key_length
            value_tile = value + keys.to(tl.int64)[:, None] * value_stride_row + columns[None, :] * value_stride_dim
            loaded = tl.load(value_tile, mask=inside[:, None] & (columns < VALUE_DIM)[None, :], other=0.0)
            mean += tl.sum(loaded.to(tl.float32), 0)
        acc = tl.where(empty[:, None], (mean / key_length)[None, :], acc)

    out_tile = out + batch * out_stride_batch + head * out_stride_head + places.to(tl.int64)[:, None] * out_stride_row
    kept = (places < query_length)[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(out_tile + columns[None, :] * out_stride_dim, acc.to(out.dtype.element_ty), mask=kept)


def reference(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, scale: float, softcap: float) -> Tensor:
    """The definition, in fp32 or wider: what runs without the kernel, and what tests compare with it."""
    group = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    query_length = query.shape[2]
    key_length = key.shape[2]
    rows = torch.arange(query_length, device=query.device)[:, None]
    keys = torch.arange(key.shape[2], device=query.device)[None, :]
    mask_0_keys = mask_0.reshape(-1, 1, 1, key_length)
    keys_of_heads = key.repeat_interleave(group, 1).to(wide)
    scores = query.to(wide) @ keys_of_heads.mT * scale
    scores = softcap * torch.tanh(scores / softcap)
    seen = (mask_0_keys != 0) & (((keys - rows >= -511) & (keys - rows <= 0)) | ((keys - rows <= 0) & (keys < 4)))
    scores = scores.masked_fill(~seen, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1)
    out = (weights @ value.repeat_interleave(group, 1).to(wide)).to(query.dtype)
    return in_memory_order(out)


def in_memory_order(out: Tensor) -> Tensor:
    """``[batch, heads, length, value_dim]`` that lies in memory as ``[batch, length, heads, value_dim]``."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ``ValueError`` for operands that this kernel was not emitted for."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"{shapes}: expected [batch, heads, length, dim] each")
    if {query.dtype, key.dtype, value.dtype} != {DTYPE}:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: expected {DTYPE} each")
    if (query.shape[3], key.shape[3], value.shape[3]) != (HEAD_DIM.value, HEAD_DIM.value, VALUE_DIM.value):
        raise ValueError(f"{shapes}: expected head_dim {HEAD_DIM.value} and value_dim {VALUE_DIM.value}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"{shapes}: expected keys as values")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: expected heads of queries a multiple of those of keys")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"{shapes}: expected one batch")


def reachable(tensor: Tensor, *counts: int) -> Tensor:
    """A tensor, copied where ``counts`` steps along its last dims leave 32 bits, in which programs count these."""
    strides = zip(reversed(tensor.stride()), reversed(counts), strict=False)
    return tensor.contiguous() if any(stride * count >= 1 << 31 for stride, count in strides) else tensor


def tiles(device: torch.device) -> tuple[int, ...]:
    """The line of ``CONFIGS`` for a device."""
    if device.type != "cuda" or torch.version.hip:
        return CONFIGS["gfx942"]
    return CONFIGS[_arch(device)]


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(arch[3:]) for arch in CONFIGS if arch.startswith("sm_"))
    return f"sm_{max([arch for arch in known if arch <= 10 * major + minor], default=known[0])}"


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_0: Tensor,
    scale: float,
    softcap: float,
    config: tuple[int, ...] | None = None,
) -> Tensor:
    """Run the kernel, by default with the device's tiles; memory of the output is [batch, length, heads, dim]."""
    check(query, key, value)
    batch, heads, query_length, _ = query.shape
    key_length, group = key.shape[2], heads // key.shape[1]
    out = query.new_empty((batch, query_length, heads, VALUE_DIM.value)).transpose(1, 2)
    if out.numel() == 0 or key_length == 0:
        return out.zero_()
    query, key = reachable(query, 256, HEAD_DIM.value), reachable(key, 256, HEAD_DIM.value)
    value = reachable(value, 256, VALUE_DIM.value)
    mask_0 = mask_0.view(torch.uint8) if mask_0.dtype == torch.bool else mask_0
    mask_0 = reachable(mask_0.reshape(-1, key_length), key_length).expand(batch, -1)

    block_m, block_n, warps, stages = config or tiles(query.device)
    grid = (triton.cdiv(query_length, block_m) * heads * batch,)
    with torch.cuda.device_of(query):
        attention_prefill_c06fa6bb[grid](
            query,
            key,
            value,
            out,
            mask_0,
            query_length,
            key_length,
            heads,
            group,
            query.stride(0),
            query.stride(1),
            query.stride(2),
            query.stride(3),
            key.stride(0),
            key.stride(1),
            key.stride(2),
            key.stride(3),
            value.stride(0),
            value.stride(1),
            value.stride(2),
            value.stride(3),
            out.stride(0),
            out.stride(1),
            out.stride(2),
            out.stride(3),
            mask_0.stride(0),
            mask_0.stride(1),
            scale,
            softcap,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return out


@torch.library.custom_op("regraft_kernels::attention_prefill_c06fa6bb", mutates_args=(), device_types="cpu")
def operator(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, scale: float, softcap: float) -> Tensor:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    check(query, key, value)
    return reference(query, key, value, mask_0, scale, softcap)


@operator.register_kernel("cuda")
def _on_device(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, scale: float, softcap: float) -> Tensor:
    return launch(query, key, value, mask_0, scale, softcap)


@operator.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, scale: float, softcap: float) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
