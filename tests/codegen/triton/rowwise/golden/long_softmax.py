"""A row-wise region of a graph: one program a few rows, each read once and its results written once.

Emitted by regraft: `regraft kernels` writes it again.

tensors  x float32 [row, 20000]; out float32 [row, 20000]
rows     row
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a program, columns of a chunk, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (1, 2048, 8, 1),
    "sm_90": (1, 2048, 8, 1),
    "sm_100": (1, 2048, 8, 1),
    "gfx942": (1, 2048, 4, 1),
}


@triton.jit
def row_max(values):
    """The largest number of each row; NaN where the row holds one."""
    odd = tl.max((values != values).to(tl.int32), 1, keep_dims=True) > 0
    return tl.where(odd, float("nan"), tl.max(values, 1, keep_dims=True))


@triton.jit
def rowwise_df9b004c(
    x,
    out,
    row_count,
    x_stride_row,
    x_stride_column,
    out_stride_row,
    out_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A few of the rows [row]."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = (places < row_count)[:, None]
    rows = tl.minimum(places, row_count - 1)[:, None]  # rows behind the end repeat the last, and are not stored
    row = rows.to(tl.int64)
    x_rows = x + row * x_stride_row
    out_rows = out + row * out_stride_row

    amax_part = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    for first in range(0, 20000, BLOCK_COLUMNS):
        lanes = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = lanes < 20000
        x_tile = tl.load(x_rows + lanes * x_stride_column, mask=inside, other=0).to(tl.float32)
        mul = x_tile * 0.125
        amax_part = tl.maximum(amax_part, tl.where(inside, mul, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    amax = row_max(amax_part)
    sum_1_part = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), 0.0, tl.float32)
    for first in range(0, 20000, BLOCK_COLUMNS):
        lanes = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = lanes < 20000
        x_tile_1 = tl.load(x_rows + lanes * x_stride_column, mask=inside, other=0).to(tl.float32)
        mul_1 = x_tile_1 * 0.125
        sub = mul_1 - amax
        exp = tl.exp(sub)
        sum_1_part = sum_1_part + tl.where(inside, exp, 0.0)
    sum_1 = tl.sum(sum_1_part, 1, keep_dims=True)
    for first in range(0, 20000, BLOCK_COLUMNS):
        lanes = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = lanes < 20000
        x_tile_2 = tl.load(x_rows + lanes * x_stride_column, mask=inside, other=0).to(tl.float32)
        mul_2 = x_tile_2 * 0.125
        sub_1 = mul_2 - amax
        exp_1 = tl.exp(sub_1)
        div = exp_1 / sum_1
        tl.store(out_rows + lanes * out_stride_column, div, mask=kept & inside)


def reference(x: Tensor) -> Tensor:
    """The definition: what runs without the kernel, and what tests compare with it."""
    mul = x * 0.125
    amax = mul.amax([-1], True)
    sub = mul - amax
    exp = sub.exp()
    sum_1 = exp.sum([-1], True)
    return exp / sum_1


def check(x: Tensor) -> tuple[int, ...]:
    """Sizes of the rows, row; raises ``ValueError`` for operands of other types or sizes."""
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}: expected 2 dims")
    row = x.shape[0]
    expect("x", x, torch.float32, (row, 20000))
    return (row,)


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


def launch(x: Tensor, config: tuple[int, ...] | None = None) -> Tensor:
    """Run the kernel, by default with the device's tiles."""
    (row,) = check(x)
    out = empty_in_order((row, 20000), (0, 1), torch.float32, x.device)
    row_count = row
    if row_count == 0:
        return out
    reach = max(row_count, x.stride(1) * 20000, out.stride(1) * 20000)
    if reach >= 2**31:  # farther than a kernel counts
        return reference(x)
    block_rows, block_columns, warps, stages = config or tiles(x.device)
    grid = (triton.cdiv(row_count, block_rows),)
    with torch.cuda.device_of(x):
        rowwise_df9b004c[grid](
            x,
            out,
            row_count,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=warps,
            num_stages=stages,
        )
    return out


@torch.library.custom_op("regraft_kernels::rowwise_df9b004c", mutates_args=(), device_types="cpu")
def operator(x: Tensor) -> Tensor:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    outputs = _fake(x)
    return outputs.copy_(reference(x))


@operator.register_kernel("cuda")
def _on_device(x: Tensor) -> Tensor:
    return launch(x)


@operator.register_fake
def _fake(x: Tensor) -> Tensor:
    (row,) = check(x)
    return empty_in_order((row, 20000), (0, 1), torch.float32, x.device)
