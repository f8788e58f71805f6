"""Attention over parts of the keys on a GPU: kernels with a log-sum-exp, interpreted, beside the definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.codegen.triton.attention_part_lower import joined
from regraft.codegen.triton.lower import KernelExecutable, lower
from regraft.ir import ops
from regraft.ir.records import Log
from regraft.ir.verify import relative_l2
from tests.codegen.triton.formula import draw
from tests.codegen.triton.interpreted import Run
from tests.support import captured

FP32, FP16 = torch.float32, torch.float16
KEYS, FIRST = 24, 8
PADDING = torch.arange(KEYS)[None] < torch.tensor([[24], [11]])
DOCUMENTS = torch.arange(KEYS)[None].expand(2, KEYS) // 7
MANY = 18  # queries, more than there are keys in a part


class Part(nn.Module):
    """Attention of all queries over the keys from ``FIRST`` on, and its merge with that over the keys before."""

    def __init__(self, first: int, merged: bool, **options: Any) -> None:
        super().__init__()
        self.first, self.merged, self.options = first, merged, options

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, slopes: Tensor | None,
        sinks: Tensor | None, tensors: list[Tensor],
    ) -> Tensor:  # fmt: skip
        def part(first: int, last: int, sinks: Tensor | None) -> Tensor:
            keys, values = (tensor[:, :, first:last] for tensor in (key, value))
            given = query, keys, values, tensors, bias, slopes, sinks
            return ops.attention_part(*given, first=first, keys=KEYS, **self.options)  # type: ignore[no-any-return]

        if not self.merged:
            return part(self.first, KEYS, sinks)
        parts = torch.stack([part(0, self.first, sinks), part(self.first, KEYS, None)])
        return ops.attention_merge(parts, dtype=query.dtype, empty_rows="zero")  # type: ignore[no-any-return]


def inputs(dtype: torch.dtype, queries: int, named: set[str]) -> tuple[Any, ...]:
    given = draw(2, 4, queries, 16), draw(2, 2, KEYS, 16, seed=1), draw(2, 2, KEYS, 8, seed=2)
    added = {"bias": draw(4, queries, KEYS, seed=3), "slopes": -draw(4, seed=4).abs(), "sinks": draw(4, seed=5)}
    return (
        *(tensor.to(dtype) for tensor in given),
        *(tensor if name in named else None for name, tensor in added.items()),
        [
            PADDING,
            DOCUMENTS,
            draw(2, 1, queries, KEYS, seed=7) > 0,
            torch.tensor([24, 5]),
            torch.arange(queries)[None].expand(2, queries) // 4,
        ],
    )


def lowered(model: Part, given: tuple[Any, ...]) -> tuple[KernelExecutable, Log]:
    log = Log()
    return lower(captured(model, given), log), log


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "causal": ({"mask": "band(None,key_len - query_len)"}, set()),
    "padding, window, bias": ({"mask": "keys(0) & band(-9,3)"}, {"bias"}),
    "documents": ({"mask": "same(4,1) & prefix(20)"}, {"slopes"}),
    "any pairs": ({"mask": "dense(2) | chunk(4,2)", "softcap": 3.0}, set()),
    "lengths": ({"mask": "lengths(3)"}, {"bias"}),
    "a number at masked keys": ({"mask": "keys(0)", "mask_fill": -2.0}, set()),
}


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("name", CASES)
def test_a_part_is_its_definition(run: Run, name: str, queries: int) -> None:
    """On the CPU as lowered, and its kernel on what it is called with."""
    options, named = CASES[name]
    for dtype in (FP32, FP16):
        model, given = Part(FIRST, False, scale=0.3, **options), inputs(dtype, queries, named)
        executable, _ = lowered(model, given)
        wide = [x.double() if isinstance(x, Tensor) else x for x in given[:-1]]
        wanted, tolerance = model(*wide, given[-1]), 3e-6 if dtype == FP32 else 2e-3
        (kernel,) = executable.kernels
        assert kernel.name.startswith("attention_decode" if queries == 1 else "attention_prefill")
        watch = _Watch(executable.module)
        (found,) = watch.run(*given[:-1], *given[-1])
        assert found.dtype == FP32 and _close(found, wanted, tolerance)
        out, lse = run(kernel, dict(zip(kernel.operands, watch.operands, strict=True)), config=(16, 16, 4, 1))
        assert out.dtype == FP32
        slopes = given[4]
        assert _close(joined(out, lse, None, slopes, FIRST), wanted, tolerance)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    finite = wanted.isfinite()
    same = torch.equal(finite, found.isfinite())
    return same and relative_l2(found.double()[finite], wanted[finite]) < tolerance


class _Watch(fx.Interpreter):
    """Runs a graph and keeps what its kernel is called with."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.operands: tuple[Any, ...] = ()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "regraft_kernels" in str(target):
            self.operands = args
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("queries", [1, MANY])
def test_parts_and_their_merge_are_attention_over_all_keys(queries: int) -> None:
    options: dict[str, Any] = {"scale": 0.3, "mask": "keys(0) & band(None,key_len - query_len)"}
    given = inputs(FP32, queries, {"sinks"})
    executable, log = lowered(Part(FIRST, True, **options), given)
    assert len(executable.kernels) == 3 and not [row for row in log.refusals if "runs" in row.reason]
    query, key, value, bias, slopes, sinks, tensors = given
    wanted = ops.attention(query, key, value, tensors, bias, slopes, sinks, empty_rows="zero", **options)
    (found,) = executable(*given[:-1], *tensors)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("first", "options", "named", "reason"),
    [
        (FIRST, {"mask": "chunk(5)"}, set(), "do not begin with a chunk of 5"),
        (FIRST, {}, {"slopes", "sinks"}, "slopes shift all scores"),
        (FIRST, {"scale": -1.0}, set(), "scale is -1.0"),
    ],
)
def test_what_has_no_kernel_runs_its_definition(
    first: int, options: dict[str, Any], named: set[str], reason: str
) -> None:
    model, given = Part(first, False, **{"scale": 0.3, **options}), inputs(FP32, MANY, named)
    executable, log = lowered(model, given)
    (refusal,) = (row.reason for row in log.refusals if "the definition runs" in row.reason)
    assert reason in refusal and not executable.kernels
    (found,) = executable(*given[:-1], *given[-1])
    torch.testing.assert_close(found, model(*given))
