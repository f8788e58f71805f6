"""Attention in blocks of rows: equal to the definition on the dense mask, with keys that no row sees left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu import attention_blocks
from regraft.codegen.cpu.attention_blocks import attend_blocks, blocks
from regraft.ir.mask import parse, spans
from regraft.ir.ops.attention import reference
from regraft.ir.verify import relative_l2

HEADS, KV_HEADS, LENGTH, KEYS, SIZE = 4, 2, 90, 110, 8
MASKS = (
    "all",
    "none",
    "band(None,0)",
    "band(None,0) & (prefix(3) | band(-12,None))",
    "band(None,20) & (heads(2,4) | band(-6,None))",
    "heads(1,2) & chunk(7)",
    "same(0,1)",
)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "_SCORES", 2000)


def given(mask: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], list[Tensor], Tensor]:
    operands = (draw(2, HEADS, LENGTH, SIZE), draw(2, KV_HEADS, KEYS, SIZE, seed=1), draw(2, KV_HEADS, KEYS, 5, seed=2))
    documents = [torch.arange(n).expand(2, -1) * torch.tensor([[1], [2]]) // 30 for n in (LENGTH, KEYS)]
    table = spans(parse(mask), HEADS, LENGTH, KEYS, documents)
    assert table is not None
    return tuple(tensor.to(dtype) for tensor in operands), documents, table


@pytest.mark.parametrize("rows", ["nan", "zero"])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_are_the_definition(mask: str, rows: str) -> None:
    operands, documents, table = given(mask)
    bias, slopes, sinks = draw(1, HEADS, 1, KEYS, seed=3), draw(HEADS, seed=4), draw(HEADS, seed=5)
    cases: tuple[dict[str, Any], ...] = ({}, {"sinks": sinks}, {"bias": bias, "slopes": slopes}, {"softcap": 2.0})
    for case in cases:
        extra = [case.get(name) for name in ("bias", "slopes", "sinks")]
        softcap = case.get("softcap", 0.0)
        out = attend_blocks(*operands, table, *extra, 0.4, rows, softcap)  # type: ignore[arg-type]
        wide = [tensor.double() for tensor in operands]
        double = [None if tensor is None else tensor.double() for tensor in extra]
        wanted = reference(*wide, documents, *double, 0.4, mask, None, rows, softcap)  # type: ignore[arg-type]
        assert relative_l2(out.double(), wanted) <= 2e-6, case


def test_low_precision_keeps_its_type() -> None:
    operands, documents, table = given("band(-8,0)", torch.bfloat16)
    out = attend_blocks(*operands, table, None, None, None, 0.4, "zero", 0.0)  # type: ignore[call-arg]
    wanted = reference(*operands, documents, None, None, None, 0.4, "band(-8,0)", None, "zero", 0.0)  # type: ignore[call-arg]
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, wanted) <= 1e-2


def test_a_windows_blocks_hold_few_keys_and_heads_that_differ_are_apart() -> None:
    table = spans(parse("band(None,0) & (heads(2,4) | band(-6,None))"), 4, 3000, 3000)
    assert table is not None
    found = list(blocks(table, 1, 4, 1, 3000, 3000))
    assert {(block.heads.start, block.heads.stop) for block in found} == {(0, 2), (2, 4)}
    near = [block.keys for block in found if block.heads.start == 0]
    assert all(isinstance(keys, slice) and keys.stop - keys.start <= 2 * 16 + 6 for keys in near)
    sink = spans(parse("band(None,0) & (prefix(3) | band(-6,None))"), 1, 3000, 3000)
    assert sink is not None
    last = list(blocks(sink, 1, 1, 1, 3000, 3000))[-1].keys
    assert isinstance(last, Tensor) and last[:3].tolist() == [0, 1, 2] and len(last) < 60


def test_a_group_of_queries_whose_heads_differ_is_one_block() -> None:
    table = spans(parse("heads(1,2) | band(0,0)"), 4, 20, 20)
    assert table is not None
    assert {(b.heads.start, b.heads.stop) for b in blocks(table, 1, 4, 2, 20, 20)} == {(0, 2), (2, 4)}
