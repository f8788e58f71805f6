"""Row-wise kernels, interpreted, beside the function that they come from in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir import ops
from tests.codegen.triton.interpreted import Run
from tests.codegen.triton.rowwise.support import compare

aten = torch.ops.aten
HALF, FULL = torch.float16, torch.float32


def draw(*size: int, dtype: torch.dtype = FULL, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """As Llama writes it."""
    raised = x.float() if x.dtype != torch.float64 else x
    normed = raised * torch.rsqrt(raised.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def turned_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as Llama writes it."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: a norm without weights, then a shift and a scale of the sample."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:])
    return normed * (1 + scale[:, None]) + shift[:, None]


def gemma(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight is applied in fp32, as a difference from one."""
    normed, total = ops.add_norm(x, residual, weight, None, 1e-6, "rms_norm", 1.0, "after_weight")
    return normed, total


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm of each head, heads in front, then rotary embedding."""
    return ops.rope(ops.rms_norm(x, weight, 1e-6).transpose(1, 2), cos, sin, x.shape[-1])


def last_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Scores with a mask that broadcasts over heads."""
    return torch.softmax(torch.where(mask, x * 0.3, float("-inf")), -1)


ROW = (2, 5, 48)
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms norm as written out": (rms, [ROW, (48,)]),
    "residual, norm": (lambda x, y, w: rms(x + y, w), [ROW, ROW, (48,)]),
    "residual, norm, both kept": (gemma, [ROW, ROW, (48,)]),
    "layer norm": (lambda x, w, b: torch.nn.functional.layer_norm(x, (48,), w, b), [ROW, (48,), (48,)]),
    "modulated norm": (modulated, [ROW, (2, 48), (2, 48)]),
    "gate": (lambda gate, up: torch.nn.functional.silu(gate) * up, [ROW, ROW]),
    "gate in halves": (lambda x: torch.nn.functional.gelu(x[..., :24]) * x[..., 24:], [ROW]),
    "rope as written out": (turned_half, [(2, 3, 5, 16), (5, 16), (5, 16)]),
    "qk norm and rope": (qk_norm_rope, [(2, 5, 3, 16), (16,), (5, 16), (5, 16)]),
    "log softmax": (lambda x: torch.log_softmax(x, -1), [(7, 37)]),
    "norm of length one": (lambda x: torch.nn.functional.normalize(x, dim=-1), [(3, 11)]),
    "a number a row": (lambda x: (x * x).sum(-1), [(3, 4, 40)]),
    "mean, variance and maximum": (lambda x: (x.mean(-1), x.var(-1), x.amax(-1, keepdim=True)), [(3, 40)]),
    "log of a sum": (lambda x: torch.logsumexp(x, -1, keepdim=True) - x, [(3, 40)]),
    "a bias for each head": (lambda x, b: torch.tanh(x + b), [(2, 3, 4, 8), (3, 1, 1)]),
}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_region(run: Run, name: str, dtype: torch.dtype) -> None:
    function, sizes = CASES[name]
    compare(run, function, *(draw(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)))


LAYOUTS = ("half", "interleaved", "interleaved_to_half")


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", [False, True], ids=["a number a column", "a number a pair"])
def test_rotary_layouts(run: Run, layout: str, width: int, pairs: bool) -> None:
    """Pieces of a row are turned where they lie; what lies behind ``rotary_dim`` passes, in the promoted type."""
    tables = [draw(5, width // 2 if pairs else width, seed=seed) for seed in (1, 2)]
    compare(run, lambda x, c, s: ops.rope(x, c, s, width, layout), draw(2, 3, 5, 16, dtype=HALF), *tables)


@pytest.mark.parametrize("activation", ["relu", "relu_squared", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"])
def test_gates(run: Run, activation: str) -> None:
    compare(run, lambda gate, up: ops.glu(gate, up, activation), draw(6, 40), draw(6, 40, seed=1))


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_masked_softmax(run: Run, dtype: torch.dtype) -> None:
    """A row that the mask hides is NaN, as PyTorch has it."""
    mask = draw(2, 1, 5, 37, seed=3) > 0
    mask[1, 0, 2] = False
    compare(run, last_softmax, draw(2, 3, 5, 37, dtype=dtype), mask)


def test_whole_numbers_and_truth_values(run: Run) -> None:
    def function(x: Tensor, ids: Tensor) -> Any:
        later = ids > 3
        return torch.where(later & ~(x < 0), x, 0.0) + ids, later, ids * 2 + 1

    compare(run, function, draw(4, 33), torch.arange(4 * 33).reshape(4, 33) % 7)


ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": torch.nn.functional.elu,
    "softplus": torch.nn.functional.softplus,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "hardtanh": torch.nn.functional.hardtanh,
    "mish": torch.nn.functional.mish,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "powers": lambda x: x.abs() ** 0.5 + x**3 + (x.abs() + 1) ** -0.5 + 1 / (x + 10) ** 2,
    "sines": lambda x: torch.sin(x * 3) + torch.cos(x * 30),
    "roundings": lambda x: torch.floor(x) - torch.ceil(x * 2),
    "minimum": lambda x: torch.minimum(torch.maximum(x, -x), x * x),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_operators_of_one_element(run: Run, name: str) -> None:
    compare(run, ELEMENTS[name], torch.cat((draw(3, 20), draw(3, 20) * 1e-3), -1))


def test_what_is_not_a_number_stays(run: Run) -> None:
    x = draw(4, 21)
    x[1, 3], x[2, 20], x[3, 0] = float("nan"), float("inf"), float("-inf")
    compare(run, lambda x: (torch.relu(x), x.amax(-1), x.amin(-1), torch.softmax(x, -1), x.clamp(-1, 1)), x)


@pytest.mark.parametrize("layout", ["columns apart", "rows apart", "one row for all", "reversed"])
def test_any_strides(run: Run, layout: str) -> None:
    operands = {
        "columns apart": draw(4, 5, 48)[..., ::2],
        "rows apart": draw(4, 9, 24)[:, 2:7],
        "one row for all": draw(24).expand(4, 5, 24),
        "reversed": draw(24, 5, 4).permute(2, 1, 0),
    }
    compare(run, lambda x, y, w: rms(x + y, w), operands[layout], draw(4, 5, 24, seed=1), draw(24, seed=2))


def test_rows_that_do_not_fill_a_program_and_none(run: Run) -> None:
    for count in (1, 3, 0):
        compare(run, lambda x: torch.softmax(x, -1), draw(count, 2, 9))


def test_bf16_is_rounded_where_the_graph_rounds(run: Run) -> None:
    """Products of rows are fp32, so that the interpreter computes bf16 too."""
    operands = [draw(*size, dtype=torch.bfloat16, seed=seed) for seed, size in enumerate([ROW, ROW, (48,)])]
    compare(run, lambda x, y, w: rms(x + y, w) * 1.5, *operands)


def test_a_reduction_takes_fp32_numbers_where_the_source_had_them(run: Run) -> None:
    """Sums of many small numbers of fp16 would stop growing."""
    x = torch.full((2, 3000), 0.1, dtype=HALF)
    compare(run, lambda x: x.float().sum(-1), x)
