"""Routed experts: pairs of tokens and experts sorted by expert, two grouped products, a sum over each token's.

Emitted by regraft: `regraft kernels` writes it again.

element  float16, routed in float32
sizes    8 experts, hidden 96, intermediate 160
gate     silu, gate_up
node     moe_1
source   model.py:34 in forward
rule     routed experts
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

EXPERTS = 8

#: Pairs, columns and summed numbers of a tile, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (128, 64, 32, 8, 3),
    "sm_90": (128, 64, 64, 8, 3),
    "sm_100": (128, 64, 64, 8, 3),
    "gfx942": (128, 64, 32, 8, 2),
}


#: The same where an expert has at most 16 pairs in the mean.
FEW = {
    "sm_80": (16, 32, 128, 4, 4),
    "sm_90": (16, 32, 128, 4, 4),
    "sm_100": (16, 32, 128, 4, 4),
    "gfx942": (16, 32, 128, 4, 2),
}


@triton.jit
def as_float16(x):
    """Numbers rounded to float16, held in fp32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def load_tile(address, inside, WHOLE: tl.constexpr):
    """A tile; what lies behind the end of the summed dim is zero."""
    if WHOLE:
        tile = tl.load(address)
    else:
        tile = tl.load(address, mask=inside, other=0.0)
    return tile


@triton.jit
def experts_d0b113f7_first(
    hidden,
    order,
    tiles,
    first,
    inner,
    tile_count,
    top_k,
    hidden_stride_row,
    hidden_stride_column,
    first_stride_expert,
    first_stride_out,
    first_stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the inner values of one expert."""
    column_tiles = tl.cdiv(160, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tiles + tile).to(tl.int64)
    begin = tl.load(tiles + tile_count + tile)
    end = tl.load(tiles + 2 * tile_count + tile)
    if begin >= end:
        return
    places = begin + tl.arange(0, BLOCK_M)
    kept = (places < end)[:, None]
    places = tl.minimum(places, end - 1)  # rows behind the end repeat the last, and are not stored
    pairs = tl.load(order + places)[:, None].to(tl.int64)
    columns = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = columns < 160
    weight_rows = tl.minimum(columns, 159).to(tl.int64)
    rows = hidden + pairs // top_k * hidden_stride_row

    acc_0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, 96, BLOCK_K):
        lanes = start + tl.arange(0, BLOCK_K)[None, :]
        inside = lanes < 96
        operand = load_tile(rows + lanes * hidden_stride_column, inside, 96 % BLOCK_K == 0)
        address = first + expert * first_stride_expert + lanes.T * first_stride_in
        address += weight_rows * first_stride_out
        held = load_tile(address, inside.T, 96 % BLOCK_K == 0)
        acc_0 = tl.dot(operand, held, acc_0)
        address = first + expert * first_stride_expert + lanes.T * first_stride_in
        address += (160 + weight_rows) * first_stride_out
        held = load_tile(address, inside.T, 96 % BLOCK_K == 0)
        acc_1 = tl.dot(operand, held, acc_1)

    gate = as_float16(acc_0)
    up = as_float16(acc_1)
    silu = as_float16(gate * tl.sigmoid(gate))
    mul = as_float16(silu * up)
    tl.store(inner + places[:, None].to(tl.int64) * 160 + columns, mul, mask=kept & valid)


@triton.jit
def experts_d0b113f7_down(
    inner,
    order,
    tiles,
    down,
    parts,
    tile_count,
    down_stride_expert,
    down_stride_out,
    down_stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the pairs' results of one expert."""
    column_tiles = tl.cdiv(96, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tiles + tile).to(tl.int64)
    begin = tl.load(tiles + tile_count + tile)
    end = tl.load(tiles + 2 * tile_count + tile)
    if begin >= end:
        return
    places = begin + tl.arange(0, BLOCK_M)
    kept = (places < end)[:, None]
    places = tl.minimum(places, end - 1)  # rows behind the end repeat the last, and are not stored
    pairs = tl.load(order + places)[:, None].to(tl.int64)
    columns = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = columns < 96
    weight_rows = tl.minimum(columns, 95).to(tl.int64)
    rows = inner + places[:, None].to(tl.int64) * 160

    acc_0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, 160, BLOCK_K):
        lanes = start + tl.arange(0, BLOCK_K)[None, :]
        inside = lanes < 160
        operand = load_tile(rows + lanes, inside, 160 % BLOCK_K == 0)
        address = down + expert * down_stride_expert + lanes.T * down_stride_in
        address += weight_rows * down_stride_out
        held = load_tile(address, inside.T, 160 % BLOCK_K == 0)
        acc_0 = tl.dot(operand, held, acc_0)

    tl.store(parts + pairs * 96 + columns, acc_0, mask=kept & valid)


@triton.jit
def experts_d0b113f7_combine(
    parts,
    index,
    weight,
    out,
    top_k,
    index_stride_token,
    index_stride_slot,
    weight_stride_token,
    weight_stride_slot,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Some columns of a token: the sum over its pairs; one whose expert is none of these adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < 96
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for slot in range(0, top_k):
        expert = tl.load(index + token * index_stride_token + slot * index_stride_slot)
        share = tl.load(weight + token * weight_stride_token + slot * weight_stride_slot).to(tl.float32)
        if (expert >= 0) & (expert < 8):
            place = (token * top_k + slot) * 96
            total += tl.load(parts + place + columns, mask=inside, other=0.0).to(tl.float32) * share
    tl.store(out + token * 96 + columns, total, mask=inside)


def reference(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
    """The definition: what runs without the kernel, and what tests compare with it."""
    total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    for expert in range(EXPERTS):
        token, slot = torch.where(index == expert)
        rows = hidden[token]
        first_rows = project(rows, first[expert], None)
        inner = gate_function(first_rows[:, :160], first_rows[:, 160:])
        out = project(inner, down[expert], None)
        total.index_add_(0, token, out.float() * weight[token, slot, None].float())
    return total.to(torch.float32)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [rows, in]`` through one expert's projection."""
    return torch.nn.functional.linear(x, weight, bias)


def gate_function(gate: Tensor, up: Tensor) -> Tensor:
    """What an expert does between its projections."""
    silu = torch.nn.functional.silu(gate)
    return silu * up


def check(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> None:
    """Raises ``ValueError`` for operands of other types or sizes."""
    if hidden.dim() != 2 or index.dim() != 2 or index.shape[0] != hidden.shape[0] or index.dtype.is_floating_point:
        given = f"hidden is {tuple(hidden.shape)}, index {index.dtype} {tuple(index.shape)}"
        raise ValueError(f"{given}: expected [tokens, 96], and whole numbers [tokens, top_k]")
    expect("hidden", hidden, torch.float16, (hidden.shape[0], 96))
    expect("weight", weight, torch.float32, (index.shape[0], index.shape[1]))
    expect("first", first, torch.float16, (8, 320, 96))
    expect("down", down, torch.float16, (8, 96, 160))


def expect(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Raises ``ValueError`` where an operand is not what the kernel was emitted for."""
    if tensor.dtype != dtype or tuple(tensor.shape) != sizes:
        given = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{given}: this kernel was emitted for {dtype} {sizes}")


def schedule(index: Tensor, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs ``[tokens * top_k]`` sorted by expert, and of each tile its expert, first pair and the end of the expert's.

    ``tiles`` is ``[3, tiles]``, with as many tiles as there can be; those behind the last are empty. Nothing is read
    by the host.
    """
    pairs = index.reshape(-1)
    pairs = torch.where((pairs >= 0) & (pairs < EXPERTS), pairs, EXPERTS)
    held, order = torch.sort(pairs, stable=True)
    bounds = torch.searchsorted(held, torch.arange(EXPERTS + 1, device=index.device, dtype=held.dtype))
    counts = (bounds[1:] - bounds[:-1] + block_m - 1) // block_m
    ends = counts.cumsum(0)
    tile = torch.arange(min(pairs.numel(), triton.cdiv(pairs.numel(), block_m) + EXPERTS), device=index.device)
    expert = torch.searchsorted(ends, tile, right=True)
    known = expert.clamp(max=EXPERTS - 1)
    begin = bounds[known] + (tile - ends[known] + counts[known]) * block_m
    end = torch.where(expert < EXPERTS, bounds[known + 1], 0)
    return order.int(), torch.stack((known, begin, end)).int()


def tiles(device: torch.device, pairs: int) -> tuple[int, ...]:
    """The line of ``CONFIGS`` or ``FEW`` for a device and a number of pairs."""
    table = FEW if pairs <= 16 * EXPERTS else CONFIGS
    if device.type != "cuda" or torch.version.hip:
        return table["gfx942"]
    return table[_arch(device)]


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(arch[3:]) for arch in CONFIGS if arch.startswith("sm_"))
    return f"sm_{max([arch for arch in known if arch <= 10 * major + minor], default=known[0])}"


def launch(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    first: Tensor,
    down: Tensor,
    config: tuple[int, ...] | None = None,
) -> Tensor:
    """Run the kernels, by default with the device's tiles."""
    check(hidden, index, weight, first, down)
    tokens, top_k = index.shape
    pairs = tokens * top_k
    out = hidden.new_empty((tokens, 96), dtype=torch.float32)
    if pairs == 0:
        return out.zero_()
    reach = max(pairs, hidden.stride(1) * 96, first.stride(2) * first.shape[2], down.stride(2) * down.shape[2])
    if reach >= 2**31:  # farther than a kernel counts
        return reference(hidden, index, weight, first, down)
    block_m, block_n, block_k, warps, stages = config or tiles(hidden.device, pairs)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    order, tile_table = schedule(index, block_m)
    tile_count = tile_table.shape[1]
    inner = hidden.new_empty((pairs, 160))
    parts = hidden.new_empty((pairs, 96))
    with torch.cuda.device_of(hidden):
        experts_d0b113f7_first[(tile_count * triton.cdiv(160, block_n),)](
            hidden,
            order,
            tile_table,
            first,
            inner,
            tile_count,
            top_k,
            hidden.stride(0),
            hidden.stride(1),
            first.stride(0),
            first.stride(1),
            first.stride(2),
            **options,
        )
        experts_d0b113f7_down[(tile_count * triton.cdiv(96, block_n),)](
            inner,
            order,
            tile_table,
            down,
            parts,
            tile_count,
            down.stride(0),
            down.stride(1),
            down.stride(2),
            **options,
        )
        experts_d0b113f7_combine[(tokens, triton.cdiv(96, 1024))](
            parts,
            index,
            weight,
            out,
            top_k,
            index.stride(0),
            index.stride(1),
            weight.stride(0),
            weight.stride(1),
            BLOCK_COLUMNS=1024,
            num_warps=4,
        )
    return out


@torch.library.custom_op("regraft_kernels::experts_d0b113f7", mutates_args=(), device_types="cpu")
def operator(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    check(hidden, index, weight, first, down)
    return reference(hidden, index, weight, first, down)


@operator.register_kernel("cuda")
def _on_device(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
    return launch(hidden, index, weight, first, down)


@operator.register_fake
def _fake(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
    check(hidden, index, weight, first, down)
    return hidden.new_empty((hidden.shape[0], 96), dtype=torch.float32)
