"""Attention of few queries: the keys are divided among programs, and what these find is combined.

Emitted by regraft: `regraft kernels` writes it again.

element  float16, head_dim 80, value_dim 80
mask     prefix(key_len - query_len) | bits(0) & rows(1)
weights  exp, normaliser sum; a row without keys is nan
keys     contiguous
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPE = torch.float16
HEAD_DIM = tl.constexpr(80)
HEAD_DIM_PADDED = tl.constexpr(128)  # in registers only: what lies behind HEAD_DIM is loaded as 0
VALUE_DIM = tl.constexpr(80)
VALUE_DIM_PADDED = tl.constexpr(128)
LOG2E = tl.constexpr(1.4426950408889634)

#: Rows (at most) and keys of a tile, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (32, 32, 8, 2),
    "sm_90": (32, 32, 8, 2),
    "sm_100": (32, 32, 8, 2),
    "sm_120": (32, 32, 8, 2),
    "gfx942": (64, 64, 4, 1),
}
SPLIT_BYTES = 1 << 17  # of keys and values, at least, that a program reads: less does not pay for combining
MOST_SPLITS = 128


@triton.jit
def interval_0(rows, query_length, key_length):
    """The keys that each row sees by prefix(key_len - query_len): first, and one behind the last."""
    start = tl.zeros_like(rows)
    end = tl.zeros_like(rows) + key_length
    end = tl.minimum(end, key_length - query_length)
    return start, tl.maximum(start, tl.minimum(end, key_length))


@triton.jit
def interval_1(rows, query_length, key_length, mask_1_rows):
    """The keys that each row sees by rows(1): first, and one behind the last."""
    start = tl.zeros_like(rows)
    end = tl.zeros_like(rows) + key_length
    end = tl.where(mask_1_rows != 0, end, start)
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
def test_1(rows, keys, inside, query_length, key_length, mask_0_tile, mask_0_stride_word, mask_0_words):
    """Whether a row sees a key, for each pair of a tile: `rows` is a column, `keys` a row."""
    place = keys - (key_length - query_length)
    held = inside & (place >= 0) & (place < 64 * mask_0_words)
    place = tl.maximum(place, 0)
    word = tl.load(mask_0_tile + place // 64 * mask_0_stride_word, mask=held, other=0)
    mask_0_bits = (word >> (place % 64)) & 1
    return mask_0_bits != 0


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
    start_0,
    end_0,
    start_1,
    end_1,
    mask_0_tile,
    mask_0_stride_word,
    mask_0_words,
    MASKED: tl.constexpr,
):
    """One tile of keys: its scores, their weights, and what they add to the output and to its normaliser."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    columns = tl.arange(0, VALUE_DIM_PADDED)
    if MASKED:
        key = tl.load(key_tile, mask=inside[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    else:
        key = tl.load(key_tile, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    scores = tl.dot(query, key)
    if MASKED:
        seen = (keys[None, :] >= start_0[:, None]) & (keys[None, :] < end_0[:, None])
        also = (keys[None, :] >= start_1[:, None]) & (keys[None, :] < end_1[:, None])
        also &= test_1(
            rows[:, None],
            keys[None, :],
            inside[None, :],
            query_length,
            key_length,
            mask_0_tile,
            mask_0_stride_word,
            mask_0_words,
        )
        seen |= also
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far
    weights = tl.math.exp2(scores * (scale * LOG2E) - (shift * LOG2E)[:, None])
    decay = tl.math.exp2((top - shift) * LOG2E)
    total = total * decay + tl.sum(weights, 1)
    acc *= decay[:, None]
    if MASKED:
        value = tl.load(value_tile, mask=inside[:, None] & (columns < VALUE_DIM)[None, :], other=0.0)
    else:
        value = tl.load(value_tile, mask=(columns < VALUE_DIM)[None, :], other=0.0)
    acc = tl.dot(weights.to(value.dtype), value, acc)
    return acc, total, higher


@triton.jit(
    do_not_specialize=[
        "query_length",
        "key_length",
        "kv_heads",
        "group",
        "splits",
        "row_count",
        "mask_0_stride_batch",
        "mask_1_stride_batch",
        "mask_0_words",
    ]
)
def attention_decode_9f96b0ea(
    query,
    key,
    value,
    part_acc,
    part_total,
    part_top,
    mask_0,
    mask_1,
    query_length,
    key_length,
    kv_heads,
    group,
    splits,
    row_count,
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
    mask_0_stride_batch,
    mask_0_stride_row,
    mask_0_stride_word,
    mask_1_stride_batch,
    mask_1_stride_place,
    mask_0_words,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What one part of the keys adds to a tile of rows: the queries of the heads that share keys, side by side."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(query_length * group, BLOCK_M)
    kv_head = (program // row_tiles % kv_heads).to(tl.int64)
    batch = (program // row_tiles // kv_heads).to(tl.int64)
    places = program % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    packed = tl.minimum(places, query_length * group - 1)  # rows behind the end repeat the last, and are not stored
    rows = packed // group
    head = kv_head * group + packed % group
    dims = tl.arange(0, HEAD_DIM_PADDED)
    columns = tl.arange(0, VALUE_DIM_PADDED)
    lanes = tl.arange(0, BLOCK_N)

    query += batch * query_stride_batch
    query_rows = query + head * query_stride_head + rows.to(tl.int64) * query_stride_row
    query_tile = query_rows[:, None] + dims[None, :] * query_stride_dim
    queries = tl.load(query_tile, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    key += batch * key_stride_batch + kv_head * key_stride_head
    value += batch * value_stride_batch + kv_head * value_stride_head
    mask_0 += batch * mask_0_stride_batch
    mask_1 += batch * mask_1_stride_batch
    mask_0_tile = mask_0 + (rows * mask_0_stride_row)[:, None]
    mask_1_rows = tl.load(mask_1 + rows * mask_1_stride_place)

    acc = tl.zeros((BLOCK_M, VALUE_DIM_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    start_0, end_0 = interval_0(rows, query_length, key_length)
    begin_0, whole_0, whole_finish_0, finish_0 = tile_bounds(start_0, end_0, key_length, BLOCK_N)
    start_1, end_1 = interval_1(rows, query_length, key_length, mask_1_rows)
    begin_1, whole_1, whole_finish_1, finish_1 = tile_bounds(start_1, end_1, key_length, BLOCK_N)
    # In order of their first tile; what an earlier range covers is taken from a later one.
    begin_0, whole_0, whole_finish_0, finish_0, begin_1, whole_1, whole_finish_1, finish_1 = exchange(
        begin_0, whole_0, whole_finish_0, finish_0, begin_1, whole_1, whole_finish_1, finish_1
    )
    begin_1 = tl.maximum(begin_1, finish_0)
    whole_1 = tl.maximum(whole_1, finish_0)
    whole_finish_1 = tl.maximum(whole_finish_1, finish_0)
    finish_1 = tl.maximum(finish_1, finish_0)
    tiles_seen_0 = finish_0 - begin_0
    tiles_seen = tiles_seen_0 + finish_1 - begin_1

    # The tiles that some row sees, divided among the programs of these rows.
    split = tl.program_id(1)
    share = tl.cdiv(tiles_seen, splits)
    for index in range(split * share, tl.minimum((split + 1) * share, tiles_seen)):
        tile = begin_0 + index
        tile = tl.where(index < tiles_seen_0, tile, begin_1 + index - tiles_seen_0)
        keys = tile * BLOCK_N + lanes
        inside = keys < key_length
        key_rows = key + keys.to(tl.int64) * key_stride_row
        value_rows = value + keys.to(tl.int64) * value_stride_row
        key_tile = key_rows[None, :] + dims[:, None] * key_stride_dim
        value_tile = value_rows[:, None] + columns[None, :] * value_stride_dim
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
            start_0,
            end_0,
            start_1,
            end_1,
            mask_0_tile,
            mask_0_stride_word,
            mask_0_words,
            MASKED=True,
        )

    place = split * row_count + (batch * kv_heads * group + head) * query_length + rows
    kept = places < query_length * group
    part_tile = part_acc + place[:, None] * VALUE_DIM + columns[None, :]
    tl.store(part_tile, acc, mask=kept[:, None] & (columns < VALUE_DIM)[None, :])
    tl.store(part_total + place, total, mask=kept)
    tl.store(part_top + place, top, mask=kept)


@triton.jit(do_not_specialize=["row_count", "query_length", "heads", "splits"])
def attention_decode_9f96b0ea_combine(
    part_acc,
    part_total,
    part_top,
    out,
    row_count,
    query_length,
    heads,
    splits,
    out_stride_batch,
    out_stride_head,
    out_stride_row,
    out_stride_dim,
    BLOCK_ROWS: tl.constexpr,
):
    """The output of some rows from what the parts of their keys gave."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = tl.minimum(places, row_count - 1).to(tl.int64)
    columns = tl.arange(0, VALUE_DIM_PADDED)
    kept = (places < row_count)[:, None] & (columns < VALUE_DIM)[None, :]
    head = rows // query_length % heads
    batch = rows // query_length // heads
    acc = tl.zeros((BLOCK_ROWS, VALUE_DIM_PADDED), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    for split in range(0, splits):
        place = rows + split * row_count
        part = tl.load(part_acc + place[:, None] * VALUE_DIM + columns[None, :], mask=kept, other=0.0)
        higher = tl.maximum(top, tl.load(part_top + place))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.math.exp2((top - shift) * LOG2E)
        share = tl.math.exp2((tl.load(part_top + place) - shift) * LOG2E)
        total = total * decay + tl.load(part_total + place) * share
        acc = acc * decay[:, None] + part * share[:, None]
        top = higher
    acc /= total[:, None]  # a row without keys is 0/0: the softmax of nothing
    out_rows = out + batch * out_stride_batch + head * out_stride_head + rows % query_length * out_stride_row
    out_tile = out_rows[:, None] + columns[None, :] * out_stride_dim
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=kept)


def reference(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, mask_1: Tensor, scale: float) -> Tensor:
    """The definition, in fp32 or wider: what runs without the kernel, and what tests compare with it."""
    group = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    query_length = query.shape[2]
    key_length = key.shape[2]
    keys = torch.arange(key.shape[2], device=query.device)[None, :]
    mask_0_bits = bits_of(mask_0, query_length, key.shape[2], key_length)
    mask_1_rows = mask_1.reshape(-1, 1, query_length, 1)
    keys_of_heads = key.repeat_interleave(group, 1).to(wide)
    scores = query.to(wide) @ keys_of_heads.mT * scale
    seen = (keys < key_length - query_length) | ((mask_0_bits != 0) & (mask_1_rows != 0))
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1)
    out = (weights @ value.repeat_interleave(group, 1).to(wide)).to(query.dtype)
    return in_memory_order(out)


def bits_of(words: Tensor, query_length: int, width: int, key_length: int | Tensor) -> Tensor:
    """Bit n of a row's 64-bit words, for key ``key_length - query_length + n``: ``[batch or 1, 1, rows, width]``."""
    words = words.reshape(-1, 1, query_length, words.shape[-1])
    place = torch.arange(width, device=words.device) - (key_length - query_length)
    held = (place >= 0) & (place < 64 * words.shape[-1])
    index = (place.clamp(min=0) // 64).clamp(max=words.shape[-1] - 1)
    shape = torch.broadcast_shapes(index.shape, (*words.shape[:3], 1))
    chosen = words.expand(*shape[:3], -1).gather(3, index.expand(shape))
    return held & (chosen >> (place.clamp(min=0) % 64) & 1 == 1)


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


def split_count(programs: int, key_length: int, device: torch.device) -> int:
    """Into how many parts the keys of each tile of rows are divided: by bytes, so long as the device has room."""
    read = key_length * (HEAD_DIM.value + VALUE_DIM.value) * DTYPE.itemsize
    room = triton.cdiv(4 * _multiprocessors(device), max(1, programs))
    return max(1, min(triton.cdiv(read, SPLIT_BYTES), room, MOST_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_0: Tensor,
    mask_1: Tensor,
    scale: float,
    config: tuple[int, ...] | None = None,
    splits: int | None = None,
) -> Tensor:
    """Run both kernels, by default with the device's tiles; memory of the output is [batch, length, heads, dim]."""
    check(query, key, value)
    batch, heads, query_length, _ = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    key_length = read_length = key.shape[2]
    out = query.new_empty((batch, query_length, heads, VALUE_DIM.value)).transpose(1, 2)
    if out.numel() == 0 or read_length == 0:
        return out.zero_()
    query, key = reachable(query, 256, HEAD_DIM.value), reachable(key, 256, HEAD_DIM.value)
    value = reachable(value, 256, VALUE_DIM.value)
    mask_0 = mask_0.view(torch.uint8) if mask_0.dtype == torch.bool else mask_0
    mask_0 = mask_0.reshape(-1, query_length, mask_0.shape[-1])
    mask_0 = reachable(mask_0, query_length, mask_0.shape[-1]).expand(batch, -1, -1)
    mask_1 = mask_1.view(torch.uint8) if mask_1.dtype == torch.bool else mask_1
    mask_1 = reachable(mask_1.reshape(-1, query_length), query_length).expand(batch, -1)

    most_rows, block_n, warps, stages = config or tiles(query.device)
    block_m = min(most_rows, max(16, triton.next_power_of_2(query_length * group)))
    programs = triton.cdiv(query_length * group, block_m) * kv_heads * batch
    splits = splits or split_count(programs, read_length, query.device)
    row_count = batch * heads * query_length
    part_acc = query.new_empty((splits, row_count, VALUE_DIM.value), dtype=torch.float32)
    part_total = query.new_empty((splits, row_count), dtype=torch.float32)
    part_top = query.new_empty((splits, row_count), dtype=torch.float32)
    with torch.cuda.device_of(query):
        attention_decode_9f96b0ea[(programs, splits)](
            query,
            key,
            value,
            part_acc,
            part_total,
            part_top,
            mask_0,
            mask_1,
            query_length,
            key_length,
            kv_heads,
            group,
            splits,
            row_count,
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
            mask_0.stride(0),
            mask_0.stride(1),
            mask_0.stride(2),
            mask_1.stride(0),
            mask_1.stride(1),
            mask_0.shape[2],
            scale,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        attention_decode_9f96b0ea_combine[(triton.cdiv(row_count, 16),)](
            part_acc,
            part_total,
            part_top,
            out,
            row_count,
            query_length,
            heads,
            splits,
            out.stride(0),
            out.stride(1),
            out.stride(2),
            out.stride(3),
            BLOCK_ROWS=16,
        )
    return out


@torch.library.custom_op("regraft_kernels::attention_decode_9f96b0ea", mutates_args=(), device_types="cpu")
def operator(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, mask_1: Tensor, scale: float) -> Tensor:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    check(query, key, value)
    return reference(query, key, value, mask_0, mask_1, scale)


@operator.register_kernel("cuda")
def _on_device(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, mask_1: Tensor, scale: float) -> Tensor:
    return launch(query, key, value, mask_0, mask_1, scale)


@operator.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, mask_0: Tensor, mask_1: Tensor, scale: float) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
