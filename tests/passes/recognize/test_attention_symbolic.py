"""Attention of symbolic batch and length, and of several layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir import ops
from tests.ir.graphs import numbers
from tests.passes.recognize.attention_support import (
    DIM,
    HEADS,
    LOWEST,
    MASK,
    SCALE,
    K,
    Q,
    V,
    additive,
    attend,
    causal_of,
    recognized,
    sites,
    window,
)
from tests.support import needs_symbols_that_merge, run

INF = math.inf


sdpa = F.scaled_dot_product_attention
K2, V2 = K[:, :2], V[:, :2]


# ---- symbolic length -------------------------------------------------------------------------------------------


def symbolic(args: tuple[Tensor, ...]) -> Any:
    """Batch and length of query, key, value (and a mask behind them) as symbols."""
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    return (tuple({0: batch, 2 if t.dim() == 4 else 1: length} for t in args),)


DYNAMIC: dict[str, tuple[Callable[..., Tensor], str]] = {
    "plain": (lambda q, k, v, m: attend(q @ k.mT * SCALE, v), "all"),
    "causal": (lambda q, k, v, m: attend(q @ k.mT * SCALE + additive(causal_of(q, k)), v), "band(None,0)"),
    "window": (lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill(~window(q, k), -INF), v), "band(-2,0)"),
    "padding": (
        lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill((m == 0)[:, None, None], -INF), v),
        "keys(0)",
    ),
    "bmm": (
        lambda q, k, v, m: torch.bmm(
            (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * SCALE).softmax(-1), v.flatten(0, 1)
        ).view(q.shape),
        "all",
    ),
    "sdpa": (lambda q, k, v, m: sdpa(q, k, v, is_causal=True), "band(None,0)"),
}


@pytest.mark.parametrize(("name", "function", "mask"), [(name, *case) for name, case in DYNAMIC.items()], ids=DYNAMIC)
def test_symbolic_length(name: str, function: Callable[..., Tensor], mask: str) -> None:
    if name == "bmm":
        needs_symbols_that_merge()
    args = (Q, K, V, MASK)
    program, _ = recognized(function, args, symbolic(args))
    (site,) = sites(program)
    assert site["mask"] == mask

    longer = (*(numbers(3, HEADS, 9, DIM, seed=s) for s in (1, 2, 3)), torch.ones(3, 9, dtype=torch.int64))
    torch.testing.assert_close(run(program, longer), function(*longer), rtol=1e-5, atol=1e-5)


def test_a_mask_whose_length_is_spelled_differently_is_read() -> None:
    def blocks(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        seen = m.view(m.shape[0], m.shape[1] // 2, 2).any(-1).repeat_interleave(2, -1)  # 2 * (length // 2) keys
        return attend((q @ k.mT * SCALE).masked_fill(~seen[:, None, None], LOWEST), v)

    args = (*(numbers(2, HEADS, 6, DIM, seed=s) for s in (1, 2, 3)), torch.ones(2, 6, dtype=torch.bool))
    program, _ = recognized(blocks, args, True)
    assert [site["mask"] for site in sites(program)] == ["keys(0)"]

    longer = (*(numbers(3, HEADS, 8, DIM, seed=s) for s in (1, 2, 3)), (torch.arange(8) > 3).expand(3, 8))
    torch.testing.assert_close(run(program, longer), blocks(*longer), rtol=1e-5, atol=1e-5)


def test_sinks_beside_a_symbolic_number_of_keys() -> None:
    sinks = numbers(HEADS, seed=4)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        return torch.cat([q @ k.mT * SCALE, column], -1).softmax(-1)[..., :-1] @ v

    program, _ = recognized(function, (Q, K, V), symbolic((Q, K, V)))
    (site,) = sites(program)
    assert site["sinks"] is not None
    longer = tuple(numbers(3, HEADS, 9, DIM, seed=s) for s in (1, 2, 3))
    torch.testing.assert_close(run(program, longer), function(*longer), rtol=1e-5, atol=1e-5)


def test_grouped_queries_of_symbolic_length() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        few, length = k.shape[0], k.shape[2]
        k, v = (t[:, :, None].expand(few, 2, 2, length, DIM).reshape(few, HEADS, length, DIM) for t in (k, v))
        return attend(q @ k.mT * SCALE, v)

    needs_symbols_that_merge()
    args = (Q, K2.clone(), V2.clone())
    program, _ = recognized(function, args, symbolic(args))
    (site,) = sites(program)
    assert site["key"].meta["val"].shape[1] == 2
    longer = tuple(numbers(3, heads, 9, DIM) for heads in (HEADS, 2, 2))
    torch.testing.assert_close(run(program, longer), function(*longer), rtol=1e-5, atol=1e-5)


def test_two_layers_are_two_sites() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = additive(causal_of(q, k))
        once = attend(q @ k.mT * SCALE + mask, v)
        return attend(once @ k.mT * SCALE + mask, v)

    program, session = recognized(function, (Q, K, V))
    assert [site["mask"] for site in sites(program)] == ["band(None,0)"] * 2
    assert session.log.recognized() == {"attention": 2}
    assert ops.OPERATORS[ops.attention].kind == "attention"
