"""Regions put into captured models: the same outputs on the CPU, kernels shared, and a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.codegen.triton.rowwise.lower import RULE, RegionReport, lower_regions
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.pipeline import default_pipeline
from tests.codegen.triton.interpreted import Run


class Block(nn.Module):
    """A layer as current language models have it: norms of heads, rotary embedding, a gate; written out plainly."""

    def __init__(self, hidden: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.norms = nn.ParameterList([nn.Parameter(torch.rand(hidden) + 0.5) for _ in range(2)])
        self.head_norms = nn.ParameterList([nn.Parameter(torch.rand(self.size) + 0.5) for _ in range(2)])
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up, self.down = nn.Linear(hidden, 40), nn.Linear(hidden, 40), nn.Linear(40, hidden)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    def turn(self, x: Tensor) -> Tensor:
        half = self.size // 2
        angle = torch.arange(x.shape[2])[:, None] * 0.9 ** torch.arange(half)
        cos, sin = (torch.cat((table, table), -1).to(x.dtype) for table in (angle.cos(), angle.sin()))
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm(x, self.norms[0])).chunk(3, -1)
        query, key, value = (part.view(batch, length, self.heads, self.size) for part in parts)
        query, key = (
            self.turn(self.norm(heads, weight).transpose(1, 2))
            for heads, weight in zip((query, key), self.head_norms, strict=True)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value.transpose(1, 2), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        normed = self.norm(x, self.norms[1])
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class Modulated(nn.Module):
    """A layer of a diffusion transformer: shift, scale and gate come from the sample's condition."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.inner, self.outer = nn.Linear(6, 72), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.condition(nn.functional.silu(c)).chunk(3, -1)
        normed = nn.functional.layer_norm(x, (24,)) * (1 + scale[:, None]) + shift[:, None]
        return x + gate[:, None] * self.outer(nn.functional.gelu(self.inner(normed), approximate="tanh"))


def lowered(model: nn.Module, *args: Tensor, dynamic: Any = None) -> tuple[Program, RegionReport]:
    """A model rewritten by the default order for a GPU, and its regions in place."""
    program = capture(model.eval(), args, dynamic=dynamic)
    default_pipeline("cuda").run(program, Session(verify="off"))
    return program, lower_regions(program)


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "decoder": (lambda: nn.Sequential(Block(), Block()), (X,)),
    "diffusion": (Modulated, (X, torch.randn(2, 6))),
    "encoder": (lambda: nn.TransformerEncoderLayer(24, 3, 48, batch_first=True), (X,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, args = MODELS[name]
    model, args = make().to(dtype).eval(), tuple(x.to(dtype) for x in args)
    with torch.no_grad():
        wanted = model(*args)
    program, report = lowered(model, *args)
    assert report.placed
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(program.callable()(*args)[0], wanted, rtol=tolerance, atol=tolerance)


def test_layers_that_are_alike_share_kernels() -> None:
    torch.manual_seed(0)
    one, four = (lowered(nn.Sequential(*(Block() for _ in range(n))), X)[1] for n in (1, 4))
    assert set(four.kernels) <= set(one.kernels) | {site.kernel for site in four.placed if "add" in str(site.nodes)}
    assert len(four.placed) > 3 * len(one.placed) and len(four.kernels) <= len(one.kernels) + 1


def test_norm_permutation_and_rope_of_heads_are_one_kernel() -> None:
    program, report = lowered(Block(), X)
    assert any(any("rope" in n for n in s.nodes) and any("rms_norm" in n for n in s.nodes) for s in report.placed)
    calls = [node for node in program.graph.nodes if RULE in node.meta.get("provenance", ())]
    assert len([node for node in calls if "rowwise" in str(node.target)]) == len(report.placed)
    assert all(site.user_line and "one kernel" in site.reason for site in report.placed)


def test_a_symbolic_batch_and_length(run: Run) -> None:
    torch.manual_seed(0)
    model = Block()
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length"))
    program, report = lowered(model, X, dynamic=({0: batch, 1: length},))
    assert report.placed
    other = torch.randn(3, 7, 24)
    with torch.no_grad():
        torch.testing.assert_close(program.callable()(other)[0], model(other), rtol=1e-5, atol=1e-5)


def test_what_has_no_kernel_is_reported() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(torch.relu(x) * 2, 1)

    _, report = lowered(Model(), X)
    assert [site.nodes for site in report.placed] and ["another dim" in item.reason for item in report.left] == [True]
