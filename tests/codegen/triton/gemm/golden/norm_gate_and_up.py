"""A matrix product with what its operand's rows and its result go through, one program a tile of the result.

Emitted by regraft: `regraft kernels` writes it again.

tensors  x float16 [batch, row, 80]; weight float16 [80]; out float16 [batch, row, 96]; weight_1 float16 [192, 80]
rows     batch, row
node     moe_1
source   model.py:34 in forward
rule     routed experts
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows, columns and summed numbers of a tile, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (64, 64, 64, 8, 2),
    "sm_90": (64, 64, 64, 8, 2),
    "sm_100": (64, 64, 64, 8, 2),
    "gfx942": (64, 64, 32, 8, 2),
}


#: The same for at most 64 rows.
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
def product_04ba3f02(
    x,
    weight,
    out,
    weight_1,
    row_count,
    row_size,
    x_stride_batch,
    x_stride_row,
    x_stride_column,
    weight_stride_column,
    out_stride_batch,
    out_stride_row,
    out_stride_column,
    weight_1_stride_out,
    weight_1_stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the result. Programs that run together share columns: eight tiles of rows in turn."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(row_count, BLOCK_M)
    group = program // (8 * tl.cdiv(96, BLOCK_N)) * 8
    height = tl.minimum(row_tiles - group, 8)
    place = program % (8 * tl.cdiv(96, BLOCK_N))
    places = (group + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = (places < row_count)[:, None]
    rows = tl.minimum(places, row_count - 1)[:, None]  # rows behind the end repeat the last, and are not stored
    columns = (place // height) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = columns < 96
    weight_rows = tl.minimum(columns, 95).to(tl.int64)
    row = (rows % row_size).to(tl.int64)
    batch = (rows // row_size).to(tl.int64)
    x_rows = x + batch * x_stride_batch + row * x_stride_row
    out_rows = out + batch * out_stride_batch + row * out_stride_row

    mean_part = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    for first in range(0, 80, BLOCK_K):
        lanes = first + tl.arange(0, BLOCK_K)[None, :]
        inside = lanes < 80
        x_tile = tl.load(x_rows + lanes * x_stride_column, mask=inside, other=0).to(tl.float32)
        pow_1 = x_tile * x_tile
        mean_part = mean_part + tl.where(inside, pow_1, 0.0)
    mean = tl.sum(mean_part, 1, keep_dims=True) / 80.0
    add = mean + 1e-06
    rsqrt = tl.rsqrt(add)

    acc_0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, 80, BLOCK_K):
        lanes = first + tl.arange(0, BLOCK_K)[None, :]
        inside = lanes < 80
        x_tile_1 = tl.load(x_rows + lanes * x_stride_column, mask=inside, other=0).to(tl.float32)
        mul = x_tile_1 * rsqrt
        to_1 = as_float16(mul)
        weight_tile = tl.load(weight + lanes * weight_stride_column, mask=inside, other=0).to(tl.float32)
        mul_1 = as_float16(to_1 * weight_tile)
        operand = tl.where(inside, mul_1, 0.0).to(tl.float16)
        address = weight_1 + weight_rows * weight_1_stride_out + lanes.T * weight_1_stride_in
        held = load_tile(address, inside.T, 80 % BLOCK_K == 0)
        acc_0 = tl.dot(operand, held, acc_0)
        address = weight_1 + (96 + weight_rows) * weight_1_stride_out + lanes.T * weight_1_stride_in
        held = load_tile(address, inside.T, 80 % BLOCK_K == 0)
        acc_1 = tl.dot(operand, held, acc_1)

    to_2 = as_float16(acc_0)
    silu = as_float16(to_2 * tl.sigmoid(to_2))
    to_2_1 = as_float16(acc_1)
    mul_2 = as_float16(silu * to_2_1)
    tl.store(out_rows + columns * out_stride_column, mul_2, mask=kept & valid)


def reference(x: Tensor, weight: Tensor, weight_1: Tensor) -> Tensor:
    """The definition: what runs without the kernel, and what tests compare with it."""
    to = x.to(torch.float32)
    pow_1 = to**2
    mean = pow_1.mean([-1], True)
    add = mean + 1e-06
    rsqrt = add.rsqrt()
    mul = to * rsqrt
    to_1 = mul.to(torch.float16)
    mul_1 = to_1 * weight
    total = product(mul_1, weight_1)
    to_2 = total.to(torch.float16)
    slice_1 = to_2[..., :96]
    slice_2 = to_2[..., 96:192]
    silu = torch.nn.functional.silu(slice_1)
    return silu * slice_2


def check(x: Tensor, weight: Tensor, weight_1: Tensor) -> tuple[int, ...]:
    """Sizes of the rows, batch, row; raises ``ValueError`` for operands of other types or sizes."""
    if x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}: expected 3 dims")
    batch = x.shape[0]
    row = x.shape[1]
    expect("x", x, torch.float16, (batch, row, 80))
    expect("weight", weight, torch.float16, (80,))
    expect("weight_1", weight_1, torch.float16, (192, 80))
    return (batch, row)


def expect(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Raises ``ValueError`` where an operand is not what the kernel was emitted for."""
    if tensor.dtype != dtype or tuple(tensor.shape) != sizes:
        given = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{given}: this kernel was emitted for {dtype} {sizes}")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., in]`` times the transposed ``weight [out, in]``, in fp32."""
    return torch.nn.functional.linear(x.float(), weight.float())


def empty_in_order(sizes: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor whose dims lie in memory in ``order``, the outermost first."""
    places = [order.index(dim) for dim in range(len(order))]
    return torch.empty([sizes[dim] for dim in order], dtype=dtype, device=device).permute(places)


def tiles(device: torch.device, row_count: int) -> tuple[int, ...]:
    """The line of ``CONFIGS`` or ``FEW`` for a device and a number of rows."""
    table = FEW if row_count <= 64 else CONFIGS
    if device.type != "cuda" or torch.version.hip:
        return table["gfx942"]
    return table[_arch(device)]


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(arch[3:]) for arch in CONFIGS if arch.startswith("sm_"))
    return f"sm_{max([arch for arch in known if arch <= 10 * major + minor], default=known[0])}"


def launch(x: Tensor, weight: Tensor, weight_1: Tensor, config: tuple[int, ...] | None = None) -> Tensor:
    """Run the kernel, by default with the device's tiles."""
    batch, row = check(x, weight, weight_1)
    out = empty_in_order((batch, row, 96), (0, 1, 2), torch.float16, x.device)
    row_count = batch * row
    if row_count == 0:
        return out
    reach = max(row_count, x.stride(2) * 80, weight.stride(0) * 80, out.stride(2) * 96, weight_1.stride(1) * 80)
    if reach >= 2**31:  # farther than a kernel counts
        return reference(x, weight, weight_1)
    block_m, block_n, block_k, warps, stages = config or tiles(x.device, row_count)
    grid = (triton.cdiv(row_count, block_m) * triton.cdiv(96, block_n),)
    with torch.cuda.device_of(x):
        product_04ba3f02[grid](
            x,
            weight,
            out,
            weight_1,
            row_count,
            row,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            weight.stride(0),
            out.stride(0),
            out.stride(1),
            out.stride(2),
            weight_1.stride(0),
            weight_1.stride(1),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return out


@torch.library.custom_op("regraft_kernels::product_04ba3f02", mutates_args=(), device_types="cpu")
def operator(x: Tensor, weight: Tensor, weight_1: Tensor) -> Tensor:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    outputs = _fake(x, weight, weight_1)
    return outputs.copy_(reference(x, weight, weight_1))


@operator.register_kernel("cuda")
def _on_device(x: Tensor, weight: Tensor, weight_1: Tensor) -> Tensor:
    return launch(x, weight, weight_1)


@operator.register_fake
def _fake(x: Tensor, weight: Tensor, weight_1: Tensor) -> Tensor:
    batch, row = check(x, weight, weight_1)
    return empty_in_order((batch, row, 96), (0, 1, 2), torch.float16, x.device)
