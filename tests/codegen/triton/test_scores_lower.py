"""Programs that read attention's scores, lowered for a GPU and run here: what has a kernel, why the rest has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.codegen.triton.lower import KernelExecutable, lower
from regraft.ir import ops
from regraft.ir.records import Log
from tests.codegen.triton.formula import draw
from tests.support import captured

FP32, FP16, FP64 = torch.float32, torch.float16, torch.float64


class Reads(nn.Module):
    """A model of one such call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, query: Tensor, key: Tensor, keep: Tensor) -> Any:
        return self.call(query, key, keep)


def lowered(call: Callable[..., Any], *args: Tensor) -> tuple[KernelExecutable, Log]:
    """The executable, whose outputs are those of the call."""
    log = Log()
    executable = lower(captured(Reads(call), args), log)
    found, wanted = executable(*args), call(*args)
    for one, other in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return executable, log


def inputs(dtype: torch.dtype = FP32, queries: int = 9, group: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    keep = torch.arange(9)[None] < torch.tensor([[9], [5]])
    return draw(2, 2 * group, queries, 16).to(dtype), draw(2, 2, 9, 16, seed=1).to(dtype), keep


CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "lse": (lambda q, k, m: ops.attention_lse(q, k, [m], scale=0.3, mask="keys(0)", mask_fill=-1e4), "attention_rows"),
    "max": (lambda q, k, m: ops.attention_max(q, k, [], scale=0.3, mask="band(None,0)"), "attention_rows"),
    "column sums": (
        lambda q, k, m: ops.attention_column_sums(q, k, [m], scale=0.3, mask="keys(0)", mask_fill=-1e9, softcap=3.0),
        "attention_columns",
    ),
    "received": (lambda q, k, m: ops.token_scores(q, k, m, scale=0.3, kind="received"), "attention_columns"),
    "received by all": (lambda q, k, m: ops.token_scores(q, k, scale=0.3, kind="received"), "attention_columns"),
    "top-k": (lambda q, k, m: ops.attention_topk(q, k, [m], scale=0.3, mask="keys(0)", count=6), "attention_topk"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_has_a_kernel(name: str) -> None:
    call, kernel = CALLS[name]
    executable, log = lowered(call, *inputs())
    assert [made.name.rpartition("_")[0] for made in executable.kernels] == [kernel]
    assert "regraft_kernels" in str(executable.module.graph) and not any("runs" in row.reason for row in log.refusals)


def test_a_selection_is_the_highest_keys_in_rising_order() -> None:
    def select(query: Tensor, key: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return ops.select_keys(query, key, [keep], scale=0.3, mask="keys(0)", count=6)  # type: ignore[no-any-return]

    query, key, keep = inputs(queries=1)
    executable, _ = lowered(select, query, key, keep)
    assert executable.kernels[0].name.startswith("attention_topk") and "of all heads" in executable.kernels[0].source
    index, seen = executable(query, key, keep)
    assert (index[0].diff() > 0).all() and seen[1].sum(-1).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("call", "given", "reason"),
    [
        (CALLS["lse"][0], inputs(FP64), "elements are torch.float64"),
        (CALLS["column sums"][0], inputs(FP64), "elements are torch.float64"),
        (lambda q, k, m: ops.attention_max(q, k, [], scale=-1.0), inputs(), "scale is -1.0"),
        (
            lambda q, k, m: ops.attention_topk(q, k, [], scale=1.0, count=2, shared=True),
            inputs(group=17),
            "17 heads choose together",
        ),
        (
            lambda q, k, m: ops.attention_topk(q, k.repeat(1, 1, 40, 1), [], scale=1.0, count=300),
            inputs(),
            "300 keys are selected by torch.float32",
        ),
    ],
)
def test_what_has_none_says_why(call: Callable[..., Any], given: tuple[Tensor, ...], reason: str) -> None:
    executable, log = lowered(call, *given)
    (refusal,) = (row.reason for row in log.refusals if "the definition runs" in row.reason)
    assert not executable.kernels and reason in refusal
