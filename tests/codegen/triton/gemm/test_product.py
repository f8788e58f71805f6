"""Matrix products with their regions, interpreted, beside the function in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.gemm.emit import emit_product
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.emit import RegionKernel
from regraft.ir import ops
from regraft.ir.program import Program
from tests.codegen.rowwise.support import agree
from tests.codegen.triton.interpreted import Run
from tests.codegen.triton.rowwise.support import launched
from tests.support import captured

FULL, HALF = torch.float32, torch.float16
TILES = (16, 16, 16, 4, 1)


def draw(*size: int, dtype: torch.dtype = FULL, seed: int = 0) -> Tensor:
    """Small normal numbers, the same for a seed."""
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) / 4).to(dtype)


def product_of(program: Program) -> RegionKernel:
    """The kernel of all calls of a program."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    results: Any = program.output_node.args[0]
    return emit_product(calls, list(dict.fromkeys(results)), program.fake_mode)


def compare(run: Run, function: Callable[..., Any], *operands: Tensor) -> None:
    """A function's kernel, and its operator on the CPU, beside the function in fp64."""
    program = captured(function, operands)
    region = product_of(program)
    exact, usual = function(*[x.double() for x in operands]), function(*operands)
    exact, usual = ((x if isinstance(x, tuple) else (x,)) for x in (exact, usual))
    made = launched(run, region, program, operands, config=TILES)
    given_tensors = dict(zip(program.user_inputs(), operands, strict=True))
    own = load_kernel(region.kernel).operator(*(given_tensors[node] for node in region.inputs))
    for results in (made, own if isinstance(own, tuple) else (own,)):
        for result, wanted, plain in zip(results, exact, usual, strict=True):
            assert result.dtype == plain.dtype and result.shape == plain.shape
            agree(result, wanted, plain)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """Gate and up projection in one weight."""
    both = linear(x, weight)
    half = both.shape[-1] // 2
    return silu(both[..., :half]) * both[..., half:]


def normed(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return linear(ops.rms_norm(x, norm, 1e-6), weight) if x.dtype != torch.float64 else linear(_rms(x, norm), weight)


def _rms(x: Tensor, norm: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm


def from_tokens(x: Tensor, values: Tensor) -> Tensor:
    """The second half of token-parameter attention (TokenFormer): scores to a norm of length one, GELU, values."""
    scores = torch.nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5
    return linear(gelu(scores), values)


ROWS = (2, 11, 40)
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "plain": (lambda x, w: linear(x, w), [ROWS, (24, 40)]),
    "bias, gelu": (lambda x, w, b: gelu(linear(x, w, b)), [ROWS, (24, 40), (24,)]),
    "bias, residual": (lambda x, w, b, r: linear(x, w, b) + r, [ROWS, (40, 40), (40,), ROWS]),
    "scaled by the sample": (lambda x, w, s, r: r + linear(x, w) * s, [ROWS, (40, 40), (2, 1, 40), ROWS]),
    "gate and up in one": (gated, [ROWS, (48, 40)]),
    "gate and up apart": (lambda x, w, v: silu(linear(x, w)) * linear(x, v), [ROWS, (24, 40), (24, 40)]),
    "rms norm in front": (normed, [ROWS, (40,), (24, 40)]),
    "layer norm in front": (lambda x, n, b, w: linear(layer_norm(x, (40,), n, b), w), [ROWS, (40,), (40,), (24, 40)]),
    "token parameters": (from_tokens, [ROWS, (24, 40)]),
    "both results": (lambda x, w: (linear(x, w), torch.relu(linear(x, w))), [ROWS, (24, 40)]),
}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_product(run: Run, name: str, dtype: torch.dtype) -> None:
    function, sizes = CASES[name]
    compare(run, function, *(draw(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu_squared"])
def test_the_operator_of_a_linear_layer_with_its_epilogue(run: Run, activation: str) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, m: Tensor, r: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return ops.OPERATORS[ops.linear].reference(x, w, b, m, r, activation)
        return ops.linear(x, w, b, m, r, activation)

    sizes = [(7, 33), (18, 33), (18,), (7, 18), (7, 18)]
    compare(run, function, *(draw(*size, seed=seed) for seed, size in enumerate(sizes)))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(2, 40), summed=st.integers(2, 70), seed=st.integers(0, 99))
def test_any_size(run: Run, rows: int, columns: int, summed: int, seed: int) -> None:
    operands = [draw(*size, seed=seed) for size in ((rows, summed), (columns, summed), (columns,))]
    compare(run, lambda x, w, b: torch.tanh(linear(x, w, b)), *operands)


def test_any_strides(run: Run) -> None:
    """An operand of permuted rows, and a weight that lies transposed."""
    x, weight = draw(11, 3, 40).transpose(0, 1), draw(40, 24).t()
    compare(run, lambda x, w: torch.relu(linear(x, w)), x, weight)


def test_no_rows(run: Run) -> None:
    compare(run, lambda x, w: torch.relu(linear(x, w)), draw(0, 40), draw(24, 40))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: torch.softmax(linear(x, w), -1), "reduced behind a product"),
        (lambda x, w: linear(x, w) + linear(x * 2, w), "products of different operands"),
        (lambda x, w: (linear(x, w), linear(x, w)[..., :8] * 2), "different columns"),
        (lambda x, w: torch.relu(x), "there is no product"),
    ],
)
def test_what_is_no_kernel_says_why(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        product_of(captured(function, (draw(5, 40), draw(24, 40))))


def test_the_operator() -> None:
    program = captured(gated, (draw(*ROWS), draw(48, 40)))
    torch.library.opcheck(load_kernel(product_of(program).kernel).operator._opoverload, (draw(*ROWS), draw(48, 40)))
