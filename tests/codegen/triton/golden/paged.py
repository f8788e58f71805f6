"""Attention of few queries: the keys are divided among programs, and what these find is combined.

Emitted by regraft: `regraft kernels` writes it again.

element  float16, head_dim 128, value_dim 128
mask     band(None,key_len - query_len)
weights  exp, normaliser sum; a row without keys is nan
with     sinks, lse
keys     paged, 16 together
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPE = torch.float16
HEAD_DIM = tl.constexpr(128)
HEAD_DIM_PADDED = tl.constexpr(128)  # in registers only: what lies behind HEAD_DIM is loaded as 0
VALUE_DIM = tl.constexpr(128)
VALUE_DIM_PADDED = tl.constexpr(128)
LOG2E = tl.constexpr(1.4426950408889634)

PAGE_SIZE = tl.constexpr(16)  # keys that lie together under one number of `pages`
#: Rows (at most) and keys of a tile, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (32, 64, 8, 2),
    "sm_90": (64, 64, 4, 3),
    "sm_100": (64, 64, 4, 3),
    "sm_120": (32, 64, 8, 2),
    "gfx942": (64, 64, 4, 1),
}
SPLIT_BYTES = 1 << 17  # of keys and values, at least, that a program reads: less does not pay for combining
MOST_SPLITS = 128


@triton.jit
def interval_0(rows, query_length, key_length):
    """The keys that each row sees by band(None,key_len - query_len): first, and one behind the last."""
    start = tl.zeros_like(rows)
    end = tl.zeros_like(rows) + key_length
    end = tl.minimum(end, rows + key_length - query_length + 1)
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
def step(
    acc,
    total,
    top,
    query,
    key_tile,
    value_tile,
    keys,
    inside,
    scale,
    start_0,
    end_0,
    MASKED: tl.constexpr,
):
    """One tile of keys: its scores, their weights, and what they add to the output and to its normaliser."""
    if MASKED:
        key = tl.load(key_tile, mask=inside[None, :], other=0.0)
    else:
        key = tl.load(key_tile)
    scores = tl.dot(query, key)
    if MASKED:
        seen = (keys[None, :] >= start_0[:, None]) & (keys[None, :] < end_0[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far
    weights = tl.math.exp2(scores * (scale * LOG2E) - (shift * LOG2E)[:, None])
    decay = tl.math.exp2((top - shift) * LOG2E)
    total = total * decay + tl.sum(weights, 1)
    acc *= decay[:, None]
    if MASKED:
        value = tl.load(value_tile, mask=inside[:, None], other=0.0)
    else:
        value = tl.load(value_tile)
    acc = tl.dot(weights.to(value.dtype), value, acc)
    return acc, total, higher


@triton.jit(do_not_specialize=["query_length", "kv_heads", "group", "splits", "row_count", "pages_stride_batch"])
def attention_decode_b337474b(
    query,
    key,
    value,
    part_acc,
    part_total,
    part_top,
    pages,
    lengths,
    sinks,
    query_length,
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
    pages_stride_batch,
    pages_stride_entry,
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
    queries = tl.load(query_tile)
    key_length = tl.load(lengths + batch).to(tl.int32)
    pages += batch * pages_stride_batch
    key += kv_head * key_stride_head
    value += kv_head * value_stride_head

    acc = tl.zeros((BLOCK_M, VALUE_DIM_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    start_0, end_0 = interval_0(rows, query_length, key_length)
    begin_0, _, _, finish_0 = tile_bounds(start_0, end_0, key_length, BLOCK_N)
    tiles_seen = finish_0 - begin_0

    # The tiles that some row sees, divided among the programs of these rows.
    split = tl.program_id(1)
    share = tl.cdiv(tiles_seen, splits)
    for index in range(split * share, tl.minimum((split + 1) * share, tiles_seen)):
        tile = begin_0 + index
        keys = tile * BLOCK_N + lanes
        inside = keys < key_length
        page = tl.load(pages + keys // PAGE_SIZE * pages_stride_entry, mask=inside, other=0).to(tl.int64)
        key_rows = key + page * key_stride_batch + keys % PAGE_SIZE * key_stride_row
        value_rows = value + page * value_stride_batch + keys % PAGE_SIZE * value_stride_row
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
            scale,
            start_0,
            end_0,
            MASKED=True,
        )

    place = split * row_count + (batch * kv_heads * group + head) * query_length + rows
    kept = places < query_length * group
    part_tile = part_acc + place[:, None] * VALUE_DIM + columns[None, :]
    tl.store(part_tile, acc, mask=kept[:, None] & (columns < VALUE_DIM)[None, :])
    tl.store(part_total + place, total, mask=kept)
    tl.store(part_top + place, top, mask=kept)


@triton.jit(do_not_specialize=["row_count", "query_length", "heads", "splits"])
def attention_decode_b337474b_combine(
    part_acc,
    part_total,
    part_top,
    out,
    lse,
    sinks,
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
    sink = tl.load(sinks + head).to(tl.float32)
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
    row_lse = tl.where(total == 0.0, float("-inf"), top + tl.log(total))
    # A sink takes weight and gives nothing.
    highest = tl.maximum(top, sink)
    kept_weight = tl.math.exp2((top - highest) * LOG2E)
    total = total * kept_weight + tl.math.exp2((sink - highest) * LOG2E)
    acc *= kept_weight[:, None]
    acc /= total[:, None]
    out_rows = out + batch * out_stride_batch + head * out_stride_head + rows % query_length * out_stride_row
    out_tile = out_rows[:, None] + columns[None, :] * out_stride_dim
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=kept)
    tl.store(lse + rows, row_lse, mask=places < row_count)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    lengths: Tensor,
    sinks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in fp32 or wider: what runs without the kernel, and what tests compare with it."""
    group = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (cache[pages.long()].transpose(1, 2).flatten(2, 3) for cache in (key, value))
    query_length = query.shape[2]
    key_length = lengths.reshape(-1, 1, 1, 1)
    places = torch.arange(value.shape[2], device=value.device)[:, None]
    value = value.masked_fill(places >= key_length, 0.0)  # free places may hold anything
    rows = torch.arange(query_length, device=query.device)[:, None]
    keys = torch.arange(key.shape[2], device=query.device)[None, :]
    keys_of_heads = key.repeat_interleave(group, 1).to(wide)
    scores = query.to(wide) @ keys_of_heads.mT * scale
    seen = (keys - rows <= key_length - query_length) & (keys < key_length)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    column = sinks.to(wide).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1].masked_fill(empty, 0.0)
    out = (weights @ value.repeat_interleave(group, 1).to(wide)).to(query.dtype)
    return in_memory_order(out), lse.float()


def in_memory_order(out: Tensor) -> Tensor:
    """``[batch, heads, length, value_dim]`` that lies in memory as ``[batch, length, heads, value_dim]``."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def check(query: Tensor, key: Tensor, value: Tensor, pages: Tensor, lengths: Tensor, sinks: Tensor) -> None:
    """Raises ``ValueError`` for operands that this kernel was not emitted for."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"{shapes}: expected [batch or pages, heads, length, dim] each")
    if {query.dtype, key.dtype, value.dtype} != {DTYPE}:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: expected {DTYPE} each")
    if (query.shape[3], key.shape[3], value.shape[3]) != (HEAD_DIM.value, HEAD_DIM.value, VALUE_DIM.value):
        raise ValueError(f"{shapes}: expected head_dim {HEAD_DIM.value} and value_dim {VALUE_DIM.value}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"{shapes}: expected keys as values")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: expected heads of queries a multiple of those of keys")
    if key.shape[2] != PAGE_SIZE.value or pages.dim() != 2 or {pages.shape[0], lengths.numel()} != {query.shape[0]}:
        places = f"pages {tuple(pages.shape)}, lengths {tuple(lengths.shape)}"
        raise ValueError(f"{shapes}, {places}: expected {PAGE_SIZE.value} keys a page and a line of pages a batch")
    if sinks.numel() != query.shape[1]:
        raise ValueError(f"sinks {tuple(sinks.shape)}: expected one for each of {query.shape[1]} heads")


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
    pages: Tensor,
    lengths: Tensor,
    sinks: Tensor,
    scale: float,
    config: tuple[int, ...] | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run both kernels, by default with the device's tiles; memory of the output is [batch, length, heads, dim]."""
    check(query, key, value, pages, lengths, sinks)
    batch, heads, query_length, _ = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    key_length = pages.shape[1] * PAGE_SIZE.value  # at most
    read_length = key_length
    out = query.new_empty((batch, query_length, heads, VALUE_DIM.value)).transpose(1, 2)
    lse = query.new_full((batch, heads, query_length), -math.inf, dtype=torch.float32)
    if out.numel() == 0 or read_length == 0:
        return out.zero_(), lse
    query, key = reachable(query, 256, HEAD_DIM.value), reachable(key, 256, HEAD_DIM.value)
    value = reachable(value, 256, VALUE_DIM.value)
    lengths = lengths.reshape(-1).contiguous()
    sinks = sinks.reshape(-1).contiguous()

    most_rows, block_n, warps, stages = config or tiles(query.device)
    block_m = min(most_rows, max(16, triton.next_power_of_2(query_length * group)))
    programs = triton.cdiv(query_length * group, block_m) * kv_heads * batch
    splits = splits or split_count(programs, read_length, query.device)
    row_count = batch * heads * query_length
    part_acc = query.new_empty((splits, row_count, VALUE_DIM.value), dtype=torch.float32)
    part_total = query.new_empty((splits, row_count), dtype=torch.float32)
    part_top = query.new_empty((splits, row_count), dtype=torch.float32)
    with torch.cuda.device_of(query):
        attention_decode_b337474b[(programs, splits)](
            query,
            key,
            value,
            part_acc,
            part_total,
            part_top,
            pages,
            lengths,
            sinks,
            query_length,
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
            pages.stride(0),
            pages.stride(1),
            scale,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        attention_decode_b337474b_combine[(triton.cdiv(row_count, 16),)](
            part_acc,
            part_total,
            part_top,
            out,
            lse,
            sinks,
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
    return out, lse


@torch.library.custom_op("regraft_kernels::attention_decode_b337474b", mutates_args=(), device_types="cpu")
def operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    lengths: Tensor,
    sinks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    check(query, key, value, pages, lengths, sinks)
    return reference(query, key, value, pages, lengths, sinks, scale)


@operator.register_kernel("cuda")
def _on_device(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    lengths: Tensor,
    sinks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return launch(query, key, value, pages, lengths, sinks, scale)


@operator.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    lengths: Tensor,
    sinks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)
