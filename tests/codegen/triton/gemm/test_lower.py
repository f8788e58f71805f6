"""Experts, products and regions put into captured models: the same outputs on the CPU, and a report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.codegen.triton.gemm.lower import lower_kernels
from regraft.codegen.triton.lower import lower
from regraft.codegen.triton.rowwise.lower import RegionReport
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.records import Log
from regraft.passes.pipeline import default_pipeline


class Experts(nn.Module):
    """Two of four experts for each token, written as a loop over them; its routing weights sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.gates = nn.Parameter(torch.randn(4, 48, 16) / 4)
        self.downs = nn.Parameter(torch.randn(4, 16, 24) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = torch.softmax(self.router(x), -1).topk(2)
        weight = weight / weight.sum(-1, keepdim=True)
        gate, up = torch.einsum("ti,eoi->teo", x, self.gates).chunk(2, -1)
        out = torch.einsum("teo,eho->teh", nn.functional.silu(gate) * up, self.downs)
        return torch.gather(out, 1, index[..., None].expand(-1, -1, 16)).mul(weight[..., None]).sum(1)


class Feed(nn.Module):
    """A gated feed-forward block of a language model, and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.gate, self.up = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False)
        self.down = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def lowered(model: nn.Module, *args: Tensor, products: bool = False) -> tuple[Program, RegionReport]:
    """A model rewritten by the default order for a GPU, and its kernels in place."""
    program = capture(model.eval(), args)
    default_pipeline("cuda").run(program, Session(verify="off"))
    return program, lower_kernels(program, products)


def outputs_stay(model: nn.Module, *args: Tensor, products: bool = False) -> RegionReport:
    """Lower a model and compare its outputs."""
    with torch.no_grad():
        wanted = model(*args)
    program, report = lowered(model, *args, products=products)
    program.graph.lint()
    torch.testing.assert_close(program.callable()(*args)[0], wanted, rtol=1e-4, atol=1e-5)
    return report


def moe_program(**options: Any) -> tuple[Program, tuple[Tensor, ...]]:
    """A program that calls ``regraft::moe`` on tokens of six dims."""
    from regraft.ir import ops
    from tests.support import captured

    torch.manual_seed(0)
    given = (
        torch.randn(7, 6),
        torch.rand(7, 3).topk(2)[1],
        torch.rand(7, 2),
        torch.randn(3, 10, 6),
        torch.randn(3, 6, 5),
    )
    return captured(lambda *tensors: ops.moe(*tensors, **options) * 2, given), given


def test_experts_become_kernels() -> None:
    program, given = moe_program(activation="gelu")
    wanted = program.callable()(*given)[0]
    report = lower_kernels(program)
    assert [site.kernel.partition("_")[0] for site in report.placed] == ["experts"]
    torch.testing.assert_close(program.callable()(*given)[0], wanted)


def test_experts_without_a_kernel_stay_and_say_why() -> None:
    program, given = moe_program()
    double = tuple(x.double() if x.is_floating_point() else x for x in given)
    from regraft.ir import ops
    from tests.support import captured

    program = captured(lambda *tensors: ops.moe(*tensors), double)
    report = lower_kernels(program)
    assert not report.placed and "float64" in report.left[0].reason
    program.callable()(*double)


def test_products_are_on_request() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Feed(), Feed()), torch.randn(2, 50, 16)
    plain = outputs_stay(model, x)
    assert not any(name.startswith("product") for name in plain.kernels)
    report = outputs_stay(model, x, products=True)
    sites = [site for site in report.placed if site.kernel.startswith("product")]
    assert len(sites) == 4 and len({site.kernel for site in sites}) == 2
    assert any("glu" in name for site in sites for name in site.nodes)


def test_a_norm_in_front_is_part_of_a_product_of_few_rows() -> None:
    torch.manual_seed(0)
    few, many = (outputs_stay(Feed(), torch.randn(2, rows, 16), products=True) for rows in (3, 50))
    holds = [
        any("rms_norm" in name for site in report.placed if site.kernel.startswith("product") for name in site.nodes)
        for report in (few, many)
    ]
    assert holds == [True, False]


class TokenParameters(nn.Module):
    """Token-parameter attention (TokenFormer): scores of learnt keys, to a norm of length one, GELU, learnt values."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(40, 16) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.keys.t()
        scores = nn.functional.normalize(scores, dim=-1) * 40**0.5
        return nn.functional.gelu(scores) @ self.values


def test_token_parameters_are_a_product_and_one_with_the_norm_of_scores_in_front() -> None:
    torch.manual_seed(0)
    report = outputs_stay(TokenParameters(), torch.randn(2, 7, 16), products=True)
    (site,) = (site for site in report.placed if site.kernel.startswith("product"))
    words = " ".join(site.nodes)
    assert all(word in words for word in ("rms_norm", "gelu", "linear"))
    assert [item.reason for item in report.left] == ["a product by itself is the library's"]


class Joined(nn.Module):
    """A residual sum that is read twice, its norm, and a layer that reads the norm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 24)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return self.linear(self.norm(total)).relu(), total


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("products", [False, True])
def test_few_and_many_rows(products: bool, rows: int) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, activation="gelu").eval()
    assert outputs_stay(model, torch.randn(2, rows, 24), products=products).placed
    x, y = torch.randn(2, rows, 16), torch.randn(2, rows, 16)
    joined = Joined()
    program, report = lowered(joined, x, y, products=products)
    assert report.placed
    with torch.no_grad():
        for given, wanted in zip(program.callable()(x, y), joined(x, y), strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_experts_of_a_model_keep_its_outputs() -> None:
    """Whatever of a dense mixture is recognised, its outputs stay."""
    torch.manual_seed(0)
    outputs_stay(Experts(), torch.randn(9, 16))


def test_the_lowering_for_a_gpu_holds_them_and_tells() -> None:
    torch.manual_seed(0)
    model, x, log = Feed().eval(), torch.randn(2, 5, 16), Log()
    program = capture(model, (x,))
    default_pipeline("cuda").run(program, Session(verify="off"))
    calls = len(program.graph.nodes)
    executable = lower(program, log)
    torch.testing.assert_close(executable(x)[0], model(x), rtol=1e-4, atol=1e-5)
    assert {kernel.name.partition("_")[0] for kernel in executable.kernels} == {"rowwise"}
    assert log.statistics["region-kernel"].fired == len(log.applications) > 0
    assert len(program.graph.nodes) == calls  # the program itself stays
