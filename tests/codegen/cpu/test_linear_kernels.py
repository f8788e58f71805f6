"""Every kernel of a linear layer equals ``activation(x W^T + b) * m + r`` in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.codegen.cpu.context import Emitter
from regraft.codegen.cpu.linear_kernels import KERNELS, LinearShape, Operands, applicable
from regraft.codegen.cpu.native import linear as native_linear
from regraft.ir.ops.activation import ACTIVATIONS, activate
from tests.codegen.cpu.support import LINEAR_KERNELS

IN, OUT = 7, 13


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def run(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    rows: int | None = None,
) -> Tensor:
    """One kernel as a graph of its own."""
    graph, root = fx.Graph(), nn.Module()
    given = {"x": x, "bias": bias, "multiplier": multiplier, "residual": residual}
    nodes = {key: None if value is None else graph.placeholder(key) for key, value in given.items()}
    operands = Operands(weight=weight, activation=activation, rows=rows, hint="w", **nodes)  # type: ignore[arg-type]
    graph.output(KERNELS[name](Emitter(root, graph), operands))
    with torch.no_grad():
        result: Tensor = fx.GraphModule(root, graph)(*[value for value in given.values() if value is not None])
    return result


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: Tensor | None, residual: Tensor | None, name: str
) -> Tensor:
    out = x.double() @ weight.double().t()
    out = activate(out if bias is None else out + bias.double(), name)
    out = out if multiplier is None else out * multiplier.double()
    return out if residual is None else out + residual.double()


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert float((result.double() - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_every_combination_of_epilogues(name: str, activation: str) -> None:
    x, weight = draw(5, IN), draw(OUT, IN, seed=1)
    if name == "onednn_fused" and activation not in ("none", "relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"):
        pytest.skip("oneDNN has no such activation")
    if name == "native" and activation not in native_linear.ACTIVATIONS:
        pytest.skip("the kernel has no such activation")
    for has_bias, has_multiplier, has_residual in itertools.product((False, True), repeat=3):
        bias = draw(OUT, seed=2) if has_bias else None
        multiplier = draw(5, OUT, seed=3) if has_multiplier else None
        residual = draw(5, OUT, seed=4) if has_residual else None
        kept = [None if t is None else t.clone() for t in (x, weight, bias, multiplier, residual)]
        result = run(name, x, weight, bias, multiplier, residual, activation, rows=5)
        assert_close(result, formula(x, weight, bias, multiplier, residual, activation))
        for tensor, before in zip((x, weight, bias, multiplier, residual), kept, strict=True):
            assert tensor is None or before is None or torch.equal(tensor, before)  # operands are only read


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("features", [(1, 1), (3, 1), (1, 5), (33, 17)])
@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_odd_sizes(name: str, features: tuple[int, int], rows: int) -> None:
    x, weight, residual = draw(rows, features[0]), draw(features[1], features[0], seed=1), draw(rows, features[1])
    result = run(name, x, weight, None, None, residual, rows=rows)
    assert_close(result, formula(x, weight, None, None, residual, "none"))


@pytest.mark.parametrize("features", [(1500, 70), (1500, 128)])
@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_rows_that_no_cache_holds(name: str, features: tuple[int, int]) -> None:
    """16 MB of them and more: a block of rows then meets all of the weight, instead of the other way round."""
    x, weight, bias = draw(3001, features[0]), draw(features[1], features[0], seed=1), draw(features[1], seed=2)
    residual = draw(3001, features[1], seed=3)
    assert_close(run(name, x, weight, bias, residual=residual), formula(x, weight, bias, None, residual, "none"))


@pytest.mark.parametrize("operand", ["x", "residual", "multiplier"])
@pytest.mark.parametrize("layout", ["columns", "rows", "transposed"])
@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_operands_that_lie_in_a_wider_buffer(name: str, layout: str, operand: str) -> None:
    given = {"x": draw(6, IN), "residual": draw(6, OUT, seed=4), "multiplier": draw(6, OUT, seed=5)}
    chosen = given[operand]
    if layout == "columns":
        wide = torch.full((6, 40), 9.0)
        wide[:, 11 : 11 + chosen.shape[1]] = chosen
        given[operand] = wide[:, 11 : 11 + chosen.shape[1]]
    elif layout == "rows":
        wide = torch.full((12, chosen.shape[1]), 9.0)
        wide[::2] = chosen
        given[operand] = wide[::2]
    else:
        given[operand] = chosen.t().contiguous().t()
    weight = draw(OUT, IN, seed=1)
    for multiplier in (given["multiplier"], None):
        result = run(name, given["x"], weight, None, multiplier, given["residual"], rows=6)
        assert_close(result, formula(given["x"], weight, None, multiplier, given["residual"], "none"))


@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_a_number_of_rows_that_is_not_known_before(name: str) -> None:
    weight = draw(OUT, IN, seed=1)
    for rows in (1, 9):
        x = draw(rows, IN)
        assert_close(run(name, x, weight, rows=None), formula(x, weight, None, None, None, "none"))


@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_a_weight_that_is_a_slice_or_transposed(name: str) -> None:
    wide = draw(2 * OUT, 2 * IN, seed=1)
    for weight in (wide[:OUT, :IN], wide.t()[:OUT, :IN], wide[::2, ::2]):
        x = draw(4, IN)
        assert_close(run(name, x, weight, rows=4), formula(x, weight, None, None, None, "none"))


def test_which_kernels_can_run_a_shape() -> None:
    assert applicable(LinearShape(None, 4, 4, torch.bfloat16)) == ["plain"]
    assert applicable(LinearShape(None, 4, 4, torch.float64)) == ["plain"]
    if torch.backends.mkldnn.is_available():
        assert "onednn" in applicable(LinearShape(None, 4, 4, torch.float32))
        assert "onednn_fused" in applicable(LinearShape(8, 4, 4, torch.float32, activation="gelu_tanh"))
