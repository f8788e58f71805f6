"""Tokens brought together as a plan says, each in the share of its size: one program a token that stays.

Emitted by regraft: `regraft kernels` writes it again.

element  float16, width 768
outputs  merged, total, logs, normed
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPE = torch.float16
WIDTH = tl.constexpr(768)

#: Tokens that a program looks through together, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (128, 4, 1),
    "sm_90": (128, 4, 1),
    "sm_100": (128, 4, 1),
    "gfx942": (128, 4, 1),
}


@triton.jit
def as_float16(x):
    """Numbers rounded to float16, held in fp32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "left",
        "removed",
        "x_stride_batch",
        "sizes_stride_batch",
        "kept_stride_batch",
        "sources_stride_batch",
        "slots_stride_batch",
    ]
)
def token_merge_7ff95adc(
    x,
    sizes,
    kept,
    sources,
    slots,
    weight,
    bias,
    merged,
    total,
    logs,
    normed,
    left,
    removed,
    x_stride_batch,
    x_stride_token,
    x_stride_column,
    sizes_stride_batch,
    sizes_stride_token,
    kept_stride_batch,
    kept_stride_token,
    sources_stride_batch,
    sources_stride_token,
    slots_stride_batch,
    slots_stride_token,
    weight_stride_column,
    bias_stride_column,
    BLOCK_SOURCES: tl.constexpr,
):
    """One token that stays, with those that come to it."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // left
    slot = row % left
    columns = tl.arange(0, 1024)[None, :]
    inside = columns < WIDTH
    x_rows = x + batch * x_stride_batch
    slot_rows = slots + batch * slots_stride_batch
    source_rows = sources + batch * sources_stride_batch
    place = tl.load(kept + batch * kept_stride_batch + slot * kept_stride_token)
    own = tl.load(x_rows + place * x_stride_token + columns * x_stride_column, mask=inside, other=0.0).to(tl.float32)
    size_rows = sizes + batch * sizes_stride_batch
    size = tl.load(size_rows + place * sizes_stride_token)

    # What a token gives is its share of the whole, so sizes are added up first.
    for first in range(0, removed, BLOCK_SOURCES):
        order = first + tl.arange(0, BLOCK_SOURCES)
        tokens = tl.load(source_rows + order * sources_stride_token, mask=order < removed, other=0)
        coming = tl.load(slot_rows + tokens * slots_stride_token, mask=order < removed, other=-1) == slot
        size += tl.sum(tl.load(size_rows + tokens * sizes_stride_token, mask=coming, other=0.0), 0)
    tile = own
    for first in range(0, removed, BLOCK_SOURCES):
        order = tl.arange(0, BLOCK_SOURCES)
        tokens = tl.load(source_rows + (first + order) * sources_stride_token, mask=first + order < removed, other=0)
        coming = tl.load(slot_rows + tokens * slots_stride_token, mask=first + order < removed, other=-1) == slot
        for _ in range(0, tl.sum(coming.to(tl.int32), 0)):
            next = tl.min(tl.where(coming, order, BLOCK_SOURCES), 0)
            place = tl.sum(tl.where(order == next, tokens, 0), 0)
            given = tl.load(x_rows + place * x_stride_token + columns * x_stride_column, mask=inside, other=0.0)
            share = tl.load(size_rows + place * sizes_stride_token) / size
            tile += (given.to(tl.float32) - own) * share
            coming = coming & (order > next)
    tile = as_float16(tile)
    tl.store(merged + row * WIDTH + columns, tile, mask=inside)
    tl.store(total + row, size)
    tl.store(logs + row, tl.log(size))

    mean = tl.sum(tl.where(inside, tile, 0.0), 1, keep_dims=True) / 768.0
    sub = tile - mean
    pow_1 = sub * sub
    mean_1 = tl.sum(tl.where(inside, pow_1, 0.0), 1, keep_dims=True) / 768.0
    add = mean_1 + 1e-06
    rsqrt = tl.rsqrt(add)
    mul = sub * rsqrt
    weight_tile = tl.load(weight + columns * weight_stride_column, mask=inside, other=0).to(tl.float32)
    mul_1 = mul * weight_tile
    bias_tile = tl.load(bias + columns * bias_stride_column, mask=inside, other=0).to(tl.float32)
    add_1 = mul_1 + bias_tile
    to_3 = as_float16(add_1)
    tl.store(normed + row * WIDTH + columns, to_3, mask=inside)


def reference(
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    sources: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: what runs without the kernel, and what tests compare with it."""
    left, wide = kept.shape[1], torch.promote_types(x.dtype, torch.float32)
    size = sizes
    target = slots.gather(1, sources)
    dropped = target < 0
    target = target.clamp(min=0)
    flat = (target + left * torch.arange(x.shape[0], device=x.device)[:, None]).reshape(-1)
    coming = size.gather(1, sources).masked_fill(dropped, 0.0)
    total = size.gather(1, kept).reshape(-1).index_add(0, flat, coming.reshape(-1)).reshape(kept.shape)
    staying = rows(x, kept).to(wide)
    share = (coming.to(wide) / total.gather(1, target))[..., None]
    difference = (rows(x, sources).to(wide) - rows(staying, target)) * share
    difference = difference.masked_fill(dropped[..., None], 0.0).reshape(-1, WIDTH.value)
    merged = staying.reshape(-1, WIDTH.value).index_add(0, flat, difference).reshape(staying.shape).to(x.dtype)
    normed = normalised(merged, weight, bias)
    return merged, total, total.log(), normed


def rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]``."""
    flat = index + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    return x.reshape(-1, x.shape[2]).index_select(0, flat.reshape(-1)).reshape(*index.shape, x.shape[2])


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the graph does with the merged tokens."""
    to = x.to(torch.float32)
    mean = to.mean([-1], True)
    sub = to - mean
    pow_1 = sub**2
    mean_1 = pow_1.mean([-1], True)
    add = mean_1 + 1e-06
    rsqrt = add.rsqrt()
    mul = sub * rsqrt
    to_1 = weight.to(torch.float32)
    mul_1 = mul * to_1
    to_2 = bias.to(torch.float32)
    add_1 = mul_1 + to_2
    return add_1.to(torch.float16)


def check(
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    sources: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[int, int]:
    """The numbers of samples and of tokens that stay; raises ``ValueError`` for operands of other types or sizes."""
    if x.dim() != 3 or x.shape[2] != WIDTH.value or x.dtype != DTYPE:
        given = f"x is {x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{given}: expected {DTYPE} [batch, tokens, {WIDTH.value}]")
    batch, tokens = x.shape[:2]
    removed = sources.shape[-1]
    expect("sizes", sizes, torch.float32, (batch, tokens))
    expect("kept", kept, torch.int64, (batch, tokens - removed))
    expect("sources", sources, torch.int64, (batch, removed))
    expect("slots", slots, torch.int64, (batch, tokens))
    expect("weight", weight, torch.float16, (WIDTH.value,))
    expect("bias", bias, torch.float16, (WIDTH.value,))
    return batch, tokens - removed


def expect(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Raises ``ValueError`` where an operand is not what the kernel was emitted for."""
    if tensor.dtype != dtype or tuple(tensor.shape) != sizes:
        given = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{given}: this kernel was emitted for {dtype} {sizes}")


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
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    sources: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel, by default with the device's tiles."""
    batch, left = check(x, sizes, kept, sources, slots, weight, bias)
    merged, total, logs, normed = _fake(x, sizes, kept, sources, slots, weight, bias)
    if batch == 0 or left == 0:
        return merged, total, logs, normed
    block_sources, warps, stages = config or tiles(x.device)
    if x.stride(2) * WIDTH.value >= 2**31:  # farther than a kernel counts
        return reference(x, sizes, kept, sources, slots, weight, bias)
    with torch.cuda.device_of(x):
        token_merge_7ff95adc[(batch * left,)](
            x,
            sizes,
            kept,
            sources,
            slots,
            weight,
            bias,
            merged,
            total,
            logs,
            normed,
            left,
            sources.shape[1],
            x.stride(0),
            x.stride(1),
            x.stride(-1),
            sizes.stride(0),
            sizes.stride(1),
            kept.stride(0),
            kept.stride(1),
            sources.stride(0),
            sources.stride(1),
            slots.stride(0),
            slots.stride(1),
            weight.stride(-1),
            bias.stride(-1),
            BLOCK_SOURCES=block_sources,
            num_warps=warps,
            num_stages=stages,
        )
    return merged, total, logs, normed


@torch.library.custom_op("regraft_kernels::token_merge_7ff95adc", mutates_args=(), device_types="cpu")
def operator(
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    sources: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    outputs = _fake(x, sizes, kept, sources, slots, weight, bias)
    values = reference(x, sizes, kept, sources, slots, weight, bias)
    return tuple(out.copy_(value) for out, value in zip(outputs, values, strict=True))


@operator.register_kernel("cuda")
def _on_device(
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    sources: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch(x, sizes, kept, sources, slots, weight, bias)


@operator.register_fake
def _fake(
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    sources: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, left = check(x, sizes, kept, sources, slots, weight, bias)
    merged = x.new_empty((batch, left, WIDTH.value))
    total = x.new_empty((batch, left), dtype=torch.float32)
    logs = x.new_empty((batch, left), dtype=torch.float32)
    normed = x.new_empty((batch, left, WIDTH.value), dtype=torch.float16)
    return merged, total, logs, normed
