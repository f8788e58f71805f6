"""A row-wise region of a graph: one program a few rows, each read once and its results written once.

Emitted by regraft: `regraft kernels` writes it again.

tensors  x bfloat16 [axis_0, axis_2, axis_1, 128]; weight bfloat16 [128]; cos bfloat16 [axis_2, 96]; sin bfloat16
         [axis_2, 96]; out bfloat16 [axis_0, axis_1, axis_2, 128]
rows     axis_0, axis_1, axis_2
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a program, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (32, 4, 1),
    "sm_90": (32, 4, 1),
    "sm_100": (32, 4, 1),
    "gfx942": (32, 4, 1),
}


@triton.jit
def as_bfloat16(x):
    """Numbers rounded to bfloat16, held in fp32."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def rowwise_630c3441(
    x,
    weight,
    cos,
    sin,
    out,
    row_count,
    axis_1_size,
    axis_2_size,
    x_stride_axis_0,
    x_stride_axis_1,
    x_stride_axis_2,
    x_stride_column,
    weight_stride_column,
    cos_stride_axis_2,
    cos_stride_column,
    sin_stride_axis_2,
    sin_stride_column,
    out_stride_axis_0,
    out_stride_axis_1,
    out_stride_axis_2,
    out_stride_column,
    BLOCK_ROWS: tl.constexpr,
):
    """A few of the rows [axis_0, axis_1, axis_2]."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = (places < row_count)[:, None]
    rows = tl.minimum(places, row_count - 1)[:, None]  # rows behind the end repeat the last, and are not stored
    axis_2 = (rows % axis_2_size).to(tl.int64)
    axis_1 = (rows // axis_2_size % axis_1_size).to(tl.int64)
    axis_0 = (rows // (axis_1_size * axis_2_size)).to(tl.int64)
    x_rows = x + axis_0 * x_stride_axis_0 + axis_1 * x_stride_axis_1 + axis_2 * x_stride_axis_2
    cos_rows = cos + axis_2 * cos_stride_axis_2
    sin_rows = sin + axis_2 * sin_stride_axis_2
    out_rows = out + axis_0 * out_stride_axis_0 + axis_1 * out_stride_axis_1 + axis_2 * out_stride_axis_2

    lanes_48 = tl.arange(0, 64)[None, :]
    inside_48 = lanes_48 < 48
    x_tile = tl.load(x_rows + lanes_48 * x_stride_column, mask=inside_48, other=0).to(tl.float32)
    pow_1 = x_tile * x_tile
    x_tile_1 = tl.load(x_rows + (48 + lanes_48) * x_stride_column, mask=inside_48, other=0).to(tl.float32)
    pow_1_1 = x_tile_1 * x_tile_1
    lanes_32 = tl.arange(0, 32)[None, :]
    x_tile_2 = tl.load(x_rows + (96 + lanes_32) * x_stride_column).to(tl.float32)
    pow_1_2 = x_tile_2 * x_tile_2
    mean_part = tl.sum(tl.where(inside_48, pow_1, 0.0), 1, keep_dims=True)
    mean_part_1 = tl.sum(tl.where(inside_48, pow_1_1, 0.0), 1, keep_dims=True)
    mean_part_2 = tl.sum(pow_1_2, 1, keep_dims=True)
    mean = (mean_part + mean_part_1 + mean_part_2) / 128.0
    add = mean + 1e-06
    rsqrt = tl.rsqrt(add)
    mul = x_tile * rsqrt
    to_1 = as_bfloat16(mul)
    weight_tile = tl.load(weight + lanes_48 * weight_stride_column, mask=inside_48, other=0).to(tl.float32)
    mul_1 = as_bfloat16(to_1 * weight_tile)
    cos_tile = tl.load(cos_rows + lanes_48 * cos_stride_column, mask=inside_48, other=0).to(tl.float32)
    mul_2 = as_bfloat16(mul_1 * cos_tile)
    mul_3 = x_tile_1 * rsqrt
    to_1_1 = as_bfloat16(mul_3)
    weight_tile_1 = tl.load(weight + (48 + lanes_48) * weight_stride_column, mask=inside_48, other=0).to(tl.float32)
    mul_1_1 = as_bfloat16(to_1_1 * weight_tile_1)
    sin_tile = tl.load(sin_rows + lanes_48 * sin_stride_column, mask=inside_48, other=0).to(tl.float32)
    mul_3_1 = as_bfloat16(mul_1_1 * sin_tile)
    sub = as_bfloat16(mul_2 - mul_3_1)
    tl.store(out_rows + lanes_48 * out_stride_column, sub, mask=kept & inside_48)
    cos_tile_1 = tl.load(cos_rows + (48 + lanes_48) * cos_stride_column, mask=inside_48, other=0).to(tl.float32)
    mul_4 = as_bfloat16(mul_1_1 * cos_tile_1)
    sin_tile_1 = tl.load(sin_rows + (48 + lanes_48) * sin_stride_column, mask=inside_48, other=0).to(tl.float32)
    mul_5 = as_bfloat16(mul_1 * sin_tile_1)
    add_1 = as_bfloat16(mul_4 + mul_5)
    tl.store(out_rows + (48 + lanes_48) * out_stride_column, add_1, mask=kept & inside_48)
    mul_6 = x_tile_2 * rsqrt
    to_1_2 = as_bfloat16(mul_6)
    weight_tile_2 = tl.load(weight + (96 + lanes_32) * weight_stride_column).to(tl.float32)
    mul_1_2 = as_bfloat16(to_1_2 * weight_tile_2)
    tl.store(out_rows + (96 + lanes_32) * out_stride_column, mul_1_2, mask=kept)


def reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition: what runs without the kernel, and what tests compare with it."""
    to = x.to(torch.float32)
    pow_1 = to**2
    mean = pow_1.mean([-1], True)
    add = mean + 1e-06
    rsqrt = add.rsqrt()
    mul = to * rsqrt
    to_1 = mul.to(torch.bfloat16)
    mul_1 = to_1 * weight
    permute = mul_1.permute([0, 2, 1, 3])
    slice_1 = permute[..., :48]
    slice_2 = permute[..., 48:96]
    slice_3 = cos[..., :48]
    slice_4 = cos[..., 48:96]
    slice_5 = sin[..., :48]
    slice_6 = sin[..., 48:96]
    mul_2 = slice_1 * slice_3
    mul_3 = slice_2 * slice_5
    sub = mul_2 - mul_3
    mul_4 = slice_2 * slice_4
    mul_5 = slice_1 * slice_6
    add_1 = mul_4 + mul_5
    slice_7 = permute[..., 96:128]
    return torch.cat([sub, add_1, slice_7], -1)


def check(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, ...]:
    """Sizes of the rows, axis_0, axis_1, axis_2; raises ``ValueError`` for operands of other types or sizes."""
    if x.dim() != 4:
        raise ValueError(f"x is {tuple(x.shape)}: expected 4 dims")
    axis_0 = x.shape[0]
    axis_2 = x.shape[1]
    axis_1 = x.shape[2]
    expect("x", x, torch.bfloat16, (axis_0, axis_2, axis_1, 128))
    expect("weight", weight, torch.bfloat16, (128,))
    expect("cos", cos, torch.bfloat16, (axis_2, 96))
    expect("sin", sin, torch.bfloat16, (axis_2, 96))
    return (axis_0, axis_1, axis_2)


def expect(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Raises ``ValueError`` where an operand is not what the kernel was emitted for."""
    if tensor.dtype != dtype or tuple(tensor.shape) != sizes:
        given = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{given}: this kernel was emitted for {dtype} {sizes}")


def empty_in_order(sizes: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor whose dims lie in memory in ``order``, the outermost first."""
    places = [order.index(dim) for dim in range(len(order))]
    return torch.empty([sizes[dim] for dim in order], dtype=dtype, device=device).permute(places)


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


def launch(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, config: tuple[int, ...] | None = None) -> Tensor:
    """Run the kernel, by default with the device's tiles."""
    axis_0, axis_1, axis_2 = check(x, weight, cos, sin)
    out = empty_in_order((axis_0, axis_1, axis_2, 128), (0, 1, 2, 3), torch.bfloat16, x.device)
    row_count = axis_0 * axis_1 * axis_2
    if row_count == 0:
        return out
    reach = max(
        row_count,
        x.stride(3) * 128,
        weight.stride(0) * 128,
        cos.stride(1) * 96,
        sin.stride(1) * 96,
        out.stride(3) * 128,
    )
    if reach >= 2**31:  # farther than a kernel counts
        return reference(x, weight, cos, sin)
    block_rows, warps, stages = config or tiles(x.device)
    grid = (triton.cdiv(row_count, block_rows),)
    with torch.cuda.device_of(x):
        rowwise_630c3441[grid](
            x,
            weight,
            cos,
            sin,
            out,
            row_count,
            axis_1,
            axis_2,
            x.stride(0),
            x.stride(2),
            x.stride(1),
            x.stride(3),
            weight.stride(0),
            cos.stride(0),
            cos.stride(1),
            sin.stride(0),
            sin.stride(1),
            out.stride(0),
            out.stride(1),
            out.stride(2),
            out.stride(3),
            BLOCK_ROWS=block_rows,
            num_warps=warps,
            num_stages=stages,
        )
    return out


@torch.library.custom_op("regraft_kernels::rowwise_630c3441", mutates_args=(), device_types="cpu")
def operator(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    outputs = _fake(x, weight, cos, sin)
    return outputs.copy_(reference(x, weight, cos, sin))


@operator.register_kernel("cuda")
def _on_device(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return launch(x, weight, cos, sin)


@operator.register_fake
def _fake(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    axis_0, axis_1, axis_2 = check(x, weight, cos, sin)
    return empty_in_order((axis_0, axis_1, axis_2, 128), (0, 1, 2, 3), torch.bfloat16, x.device)
