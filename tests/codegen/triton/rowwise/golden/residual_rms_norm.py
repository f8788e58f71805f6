"""A row-wise region of a graph: one program a few rows, each read once and its results written once.

Emitted by regraft: `regraft kernels` writes it again.

tensors  x float16 [batch, row, 768]; residual float16 [batch, row, 768]; weight float16 [768]; out_0 float16
         [batch, row, 768]; out_1 float16 [batch, row, 768]
rows     batch, row
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a program, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (2, 4, 1),
    "sm_90": (2, 4, 1),
    "sm_100": (2, 4, 1),
    "gfx942": (2, 4, 1),
}


@triton.jit
def as_float16(x):
    """Numbers rounded to float16, held in fp32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def rowwise_ca90f219(
    x,
    residual,
    weight,
    out_0,
    out_1,
    row_count,
    row_size,
    x_stride_batch,
    x_stride_row,
    x_stride_column,
    residual_stride_batch,
    residual_stride_row,
    residual_stride_column,
    weight_stride_column,
    out_0_stride_batch,
    out_0_stride_row,
    out_0_stride_column,
    out_1_stride_batch,
    out_1_stride_row,
    out_1_stride_column,
    BLOCK_ROWS: tl.constexpr,
):
    """A few of the rows [batch, row]."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = (places < row_count)[:, None]
    rows = tl.minimum(places, row_count - 1)[:, None]  # rows behind the end repeat the last, and are not stored
    row = (rows % row_size).to(tl.int64)
    batch = (rows // row_size).to(tl.int64)
    x_rows = x + batch * x_stride_batch + row * x_stride_row
    residual_rows = residual + batch * residual_stride_batch + row * residual_stride_row
    out_0_rows = out_0 + batch * out_0_stride_batch + row * out_0_stride_row
    out_1_rows = out_1 + batch * out_1_stride_batch + row * out_1_stride_row

    lanes_768 = tl.arange(0, 1024)[None, :]
    inside_768 = lanes_768 < 768
    x_tile = tl.load(x_rows + lanes_768 * x_stride_column, mask=inside_768, other=0).to(tl.float32)
    residual_tile = tl.load(residual_rows + lanes_768 * residual_stride_column, mask=inside_768, other=0).to(tl.float32)
    add = as_float16(x_tile + residual_tile)
    pow_1 = add * add
    mean = tl.sum(tl.where(inside_768, pow_1, 0.0), 1, keep_dims=True) / 768.0
    add_1 = mean + 1e-06
    rsqrt = tl.rsqrt(add_1)
    mul = add * rsqrt
    to_1 = as_float16(mul)
    weight_tile = tl.load(weight + lanes_768 * weight_stride_column, mask=inside_768, other=0).to(tl.float32)
    mul_1 = as_float16(to_1 * weight_tile)
    tl.store(out_0_rows + lanes_768 * out_0_stride_column, mul_1, mask=kept & inside_768)
    tl.store(out_1_rows + lanes_768 * out_1_stride_column, add, mask=kept & inside_768)


def reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: what runs without the kernel, and what tests compare with it."""
    add = x + residual
    to = add.to(torch.float32)
    pow_1 = to**2
    mean = pow_1.mean([-1], True)
    add_1 = mean + 1e-06
    rsqrt = add_1.rsqrt()
    mul = to * rsqrt
    to_1 = mul.to(torch.float16)
    mul_1 = to_1 * weight
    return mul_1, add


def check(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Sizes of the rows, batch, row; raises ``ValueError`` for operands of other types or sizes."""
    if x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}: expected 3 dims")
    batch = x.shape[0]
    row = x.shape[1]
    expect("x", x, torch.float16, (batch, row, 768))
    expect("residual", residual, torch.float16, (batch, row, 768))
    expect("weight", weight, torch.float16, (768,))
    return (batch, row)


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


def launch(x: Tensor, residual: Tensor, weight: Tensor, config: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernel, by default with the device's tiles."""
    batch, row = check(x, residual, weight)
    out_0 = empty_in_order((batch, row, 768), (0, 1, 2), torch.float16, x.device)
    out_1 = empty_in_order((batch, row, 768), (0, 1, 2), torch.float16, x.device)
    row_count = batch * row
    if row_count == 0:
        return out_0, out_1
    reach = max(
        row_count,
        x.stride(2) * 768,
        residual.stride(2) * 768,
        weight.stride(0) * 768,
        out_0.stride(2) * 768,
        out_1.stride(2) * 768,
    )
    if reach >= 2**31:  # farther than a kernel counts
        return reference(x, residual, weight)
    block_rows, warps, stages = config or tiles(x.device)
    grid = (triton.cdiv(row_count, block_rows),)
    with torch.cuda.device_of(x):
        rowwise_ca90f219[grid](
            x,
            residual,
            weight,
            out_0,
            out_1,
            row_count,
            row,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            residual.stride(0),
            residual.stride(1),
            residual.stride(2),
            weight.stride(0),
            out_0.stride(0),
            out_0.stride(1),
            out_0.stride(2),
            out_1.stride(0),
            out_1.stride(1),
            out_1.stride(2),
            BLOCK_ROWS=block_rows,
            num_warps=warps,
            num_stages=stages,
        )
    return out_0, out_1


@torch.library.custom_op("regraft_kernels::rowwise_ca90f219", mutates_args=(), device_types="cpu")
def operator(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    outputs = _fake(x, residual, weight)
    values = reference(x, residual, weight)
    return tuple(out.copy_(value) for out, value in zip(outputs, values, strict=True))


@operator.register_kernel("cuda")
def _on_device(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return launch(x, residual, weight)


@operator.register_fake
def _fake(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, row = check(x, residual, weight)
    return (
        empty_in_order((batch, row, 768), (0, 1, 2), torch.float16, x.device),
        empty_in_order((batch, row, 768), (0, 1, 2), torch.float16, x.device),
    )
