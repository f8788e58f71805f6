"""Attentions that no kernel was tested for: each runs PyTorch's attention or the definition, which gives its meaning,
and the report says which; sizes of nought are a kernel's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.lower import lower
from regraft.ir import ops
from regraft.ir.records import Log
from tests.codegen.triton.formula import draw
from tests.support import captured

FP32 = torch.float32


class Site(nn.Module):
    """One attention with given options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"scale": 0.25, **options}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        operator = ops.attention_mapped if "weight" in self.options else ops.attention
        return operator(query, key, value, [], **self.options)


def runs(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[str, str]:
    """What runs a site, and why not a kernel; its output must be that of the definition."""
    model, log = Site(**options), Log()
    executable = lower(captured(model, (query, key, value)), log)
    (found,), wanted = executable(query, key, value), model(query, key, value)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3, equal_nan=True)
    return executable.choices[0].runs, " ".join(row.reason for row in log.refusals)


def operands(dtype: torch.dtype = FP32, dim: int = 8, value_dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    query, key = draw(2, 4, 6, dim), draw(2, 2, 20, dim, seed=1)
    value = draw(2, 2, 20, dim if value_dim is None else value_dim, seed=2)
    if not dtype.is_floating_point:
        return (query * 3).to(dtype), (key * 3).to(dtype), (value * 30).to(dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("options", [{}, {"mask": "band(None,-2)"}, {"softcap": 3.0}, {"weight": "sigmoid"}], ids=str)
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (operands(torch.float64), "elements are torch.float64"),
        (operands(torch.int8), "elements are torch.int8"),
        (operands(torch.int32), "elements are torch.int32"),
        (operands(dim=520), "head_dim is 520"),
        (operands(dim=1024), "head_dim is 1024"),
        (operands(value_dim=0), "value_dim is 0"),
        ((operands()[0], operands(torch.float64)[1], operands()[2]), "query, key and value are"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_what_has_no_kernel(given: tuple[Tensor, ...], reason: str, options: dict[str, Any]) -> None:
    chosen, said = runs(*given, **options)
    words = {"sdpa": "PyTorch's attention runs", "reference": "the definition runs"}
    assert reason in said and words[chosen] in said


@pytest.mark.parametrize("dim", [1, 8, 512])
def test_any_width_up_to_512_has_one(dim: int) -> None:
    assert runs(*operands(dim=dim), mask="band(None,0)")[0] == "kernel"


@pytest.mark.parametrize("options", [{}, {"mask": "band(None,-2)", "empty_rows": "zero"}], ids=str)
@pytest.mark.parametrize(("batch", "length", "keys"), [(0, 6, 20), (2, 0, 20), (2, 6, 0), (2, 0, 0)])
def test_nothing_to_attend_to(batch: int, length: int, keys: int, options: dict[str, Any]) -> None:
    query, key, value = draw(batch, 4, length, 8), draw(batch, 2, keys, 8), draw(batch, 2, keys, 8)
    assert runs(query, key, value, **options)[0] == "kernel"


def test_steps_that_leave_32_bits_are_taken_in_a_copy() -> None:
    """A key every 2^26 numbers: the 40th lies beyond what a program counts. No page between them is ever touched."""
    module = load_kernel(emit_prefill(AttentionSpec(FP32, 16, 16, "dense(0)")))
    far = torch.empty(40 << 26, dtype=torch.uint8)[:: 1 << 26]
    far.copy_(torch.arange(40))
    assert far.stride() == (1 << 26,) and module.reachable(far[None], 1, 40).stride() == (40, 1)
    assert torch.equal(module.reachable(far[None], 1, 40)[0], torch.arange(40, dtype=torch.uint8))
    near = draw(2, 3, 4).expand(5, 2, 3, 4)
    assert module.reachable(near, 256, 512) is near
