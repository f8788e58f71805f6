"""Programs lowered for a GPU, run here on CPU tensors: which sites have a kernel, what runs where none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from regraft.codegen.triton.lower import KernelExecutable, lower
from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.records import Log
from regraft.ir.verify import relative_l2
from regraft.passes.pipeline import default_pipeline
from tests.support import captured

FP32, FP16, FP64 = torch.float32, torch.float16, torch.float64


class Block(nn.Module):
    """Causal attention with grouped heads and a window, both written as PyTorch's attention."""

    def __init__(self, window: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        query = self.packed(x).unflatten(-1, (4, 4)).transpose(1, 2)
        key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        rows = torch.arange(x.shape[1], device=x.device)
        near = (rows[:, None] - rows).abs() < self.window
        again = nn.functional.scaled_dot_product_attention(mixed, key, value, near, enable_gqa=True)
        return self.out(again.transpose(1, 2).flatten(2))


class Site(nn.Module):
    """One attention with given options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"scale": 0.25, **options}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Any:
        operator = ops.attention_mapped if "weight" in self.options else ops.attention
        return operator(query, key, value, list(masks), **self.options)


def lowered(model: nn.Module, args: tuple[Any, ...], log: Log | None = None, dynamic: Any = None) -> KernelExecutable:
    program = captured(model, args, dynamic)
    default_pipeline("cuda").run(program, Session(verify="off"))
    return lower(program, log)


def of_site(dtype: torch.dtype = FP32, queries: int = 6, head_dim: int = 8, **options: Any) -> tuple[Any, Any, Log]:
    """The executable of one site, its inputs, and what was told."""
    make = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, head_dim, generator=make).to(dtype)
        for heads, length in ((4, queries), (2, 20), (2, 20))
    )
    log = Log()
    model = Site(**options)
    executable = lowered(model, (query, key, value), log)
    (given,) = executable(query, key, value)
    torch.testing.assert_close(given, model(query, key, value), rtol=1e-3, atol=1e-3)
    return executable, (query, key, value), log


def test_a_model_runs_with_kernels_and_gives_its_outputs() -> None:
    model, x, log = Block().eval(), torch.randn(3, 7, 16), Log()
    executable = lowered(model, (x,), log)
    (given,) = executable(x)
    assert relative_l2(given, model(x)) < 1e-5
    assert [choice.runs for choice in executable.choices] == ["kernel", "kernel"]
    called = [str(node.target) for node in executable.module.graph.nodes if "regraft_kernels" in str(node.target)]
    assert called == [f"regraft_kernels.{choice.kernel}.default" for choice in executable.choices]
    assert [row.new_nodes for row in log.applications] == [(choice.kernel,) for choice in executable.choices]
    assert not log.refusals and log.statistics["attention-kernel"].fired == 2


def test_sites_that_ask_for_the_same_share_a_kernel() -> None:
    model = nn.Sequential(Block(), Block()).eval()
    executable = lowered(model, (torch.randn(2, 7, 16),))
    assert len(executable.choices) == 4 and len(executable.kernels) == 2
    causal = executable.kernels[0]
    assert causal.source.count("node ") == 2  # both sites stand at its head


def test_any_length_runs_when_sizes_are_symbolic() -> None:
    model = Block().eval()
    executable = lowered(model, (torch.randn(2, 9, 16),), dynamic={"x": {1: Dim("length", min=2, max=64)}})
    for length in (2, 9, 33):
        x = torch.randn(2, length, 16)
        assert relative_l2(executable(x)[0], model(x)) < 1e-5


def test_few_queries_against_more_keys_are_decoded() -> None:
    assert of_site(queries=1)[0].choices[0].kernel.startswith("attention_decode")
    assert of_site(queries=20)[0].choices[0].kernel.startswith("attention_prefill")
    few = of_site(queries=3, bias=torch.zeros(20), sinks=torch.ones(4), softcap=3.0, slopes=torch.ones(4))
    assert few[0].choices[0].kernel.startswith("attention_decode")


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("normaliser", ["none", "sum_eps", "sum_abs"])
@pytest.mark.parametrize("weight", ["exp", "sigmoid", "relu", "gelu"])
def test_other_weights_than_a_softmax_have_kernels(weight: str, normaliser: str, queries: int) -> None:
    options = {"weight": weight, "normaliser": normaliser, "constant": 0.5, "mask": "band(None,key_len - query_len)"}
    assert of_site(queries=queries, **options)[0].choices[0].runs == "kernel"


@pytest.mark.parametrize(
    ("options", "runs", "reason"),
    [
        ({"dtype": FP64}, "sdpa", "elements are torch.float64"),
        ({"dtype": FP64, "softcap": 2.0}, "reference", "elements are torch.float64"),
        ({"dtype": FP64, "sinks": torch.ones(4)}, "reference", "elements are torch.float64"),
        ({"head_dim": 520}, "sdpa", "head_dim is 520"),
        ({"scale": -0.5}, "sdpa", "scale is -0.5"),
        ({"dtype": FP64, "weight": "relu"}, "reference", "elements are torch.float64"),
        ({"weight": "relu", "normaliser": "constant"}, "reference", "the constant of the normaliser"),
    ],
)
def test_what_has_no_kernel_is_told_with_what_runs(options: dict[str, Any], runs: str, reason: str) -> None:
    executable, _, log = of_site(**options)
    assert executable.choices[0].runs == runs and not executable.kernels
    (refusal,) = log.refusals
    instead = "PyTorch's attention runs" if runs == "sdpa" else "the definition runs"
    assert reason in refusal.reason and instead in refusal.reason and refusal.user_line


def test_the_same_program_gives_the_same_texts() -> None:
    first, second = (lowered(Block().eval(), (torch.randn(3, 7, 16),)) for _ in range(2))
    assert [kernel.source for kernel in first.kernels] == [kernel.source for kernel in second.kernels]
