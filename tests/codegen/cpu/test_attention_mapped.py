"""Attention whose weights are maps of single scores, lowered: every map and normaliser is its formula in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu import attention as lowering
from regraft.codegen.cpu import attention_blocks
from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.ir.mask import parse, to_dense
from regraft.ir.ops import attention_mapped
from regraft.ir.ops.attention_mapped import NORMALISERS, WEIGHTS
from regraft.ir.verify import relative_l2
from tests.support import captured

BATCH, HEADS, LENGTH, KEYS, SIZE = 2, 4, 70, 90, 8


@pytest.fixture(autouse=True, params=["native", "blocks", "definition"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name == "native" and NATIVE.missing():
        pytest.skip(NATIVE.missing())
    if name != "native":
        monkeypatch.setattr(lowering, "native_can_map", lambda context, given: False)
    if name == "definition":
        monkeypatch.setattr(lowering, "blocks_can", lambda context, given: False)
    monkeypatch.setattr(attention_blocks, "_WORTH_BLOCKS", 0)
    return name


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def phi(name: str, s: Tensor) -> Tensor:
    """Written from the formulas, in fp64."""
    return {
        "exp": lambda: s.exp(),
        "sigmoid": lambda: 1 / (1 + (-s).exp()),
        "relu": lambda: (s + s.abs()) / 2,
        "elu1": lambda: torch.where(s > 0, s + 1, s.exp()),
        "gelu": lambda: s / 2 * (1 + torch.erf(s / math.sqrt(2))),
        "identity": lambda: s,
    }[name]()


def formula(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, weight: str, normaliser: str, **o: Any
) -> Tensor:
    query, key, value = (tensor.double() for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * 0.5
    if o.get("softcap"):
        scores = o["softcap"] * torch.tanh(scores / o["softcap"])
    if o.get("bias") is not None:
        scores = scores + o["bias"]
    if o.get("slopes") is not None:
        scores = scores + o["slopes"].double()[:, None, None] * (torch.arange(KEYS) - torch.arange(LENGTH)[:, None])
    weights = phi(weight, scores) * allowed
    total = weights.sum(-1, keepdim=True)
    divisor = {
        "sum": total,
        "none": torch.ones(1),
        "sum_eps": total + 1e-3,
        "sum_abs": total.abs().clamp(min=1),
        "constant": torch.tensor(7.0),
    }[normaliser]
    return weights @ value / divisor


def compiled(args: tuple[Tensor, ...], masks: list[Tensor], **options: Any) -> Tensor:
    extra = [options.pop(name, None) for name in ("bias", "slopes")]

    def site(query: Tensor, key: Tensor, value: Tensor, *given: Tensor) -> Any:
        return attention_mapped(query, key, value, list(given), *extra, scale=0.5, **options)

    out: Tensor = lower(captured(site, (*args, *masks)))(*args, *masks)[0]
    return out


CONSTANTS = {"sum_eps": 1e-3, "constant": 7.0}
OPERANDS = draw(BATCH, HEADS, LENGTH, SIZE), draw(BATCH, 2, KEYS, SIZE, seed=1), draw(BATCH, 2, KEYS, SIZE, seed=2)


@pytest.mark.parametrize("mask", ["all", "band(None,20) & (prefix(3) | band(-9,None))"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_map_and_normaliser(weight: str, mask: str) -> None:
    allowed = to_dense(parse(mask), [], BATCH, HEADS, LENGTH, KEYS)
    for normaliser in NORMALISERS:
        if normaliser in ("sum", "sum_eps") and weight in ("identity", "gelu", "relu"):
            continue  # a sum near zero makes any rounding large
        out = compiled(
            OPERANDS, [], weight=weight, normaliser=normaliser, mask=mask, constant=CONSTANTS.get(normaliser, 0.0)
        )
        assert relative_l2(out.double(), formula(*OPERANDS, allowed, weight, normaliser)) <= 5e-6, normaliser


@pytest.mark.parametrize("weight", ["sigmoid", "elu1"])
@pytest.mark.parametrize("mask", ["keys(0)", "heads(1,3) | band(-4,4)", "dense(0)"])
def test_padding_heads_and_tensors_hide_keys_beside_biases(mask: str, weight: str) -> None:
    masks = []
    if "(0)" in mask:
        masks = [draw(BATCH, *(() if mask == "keys(0)" else (1, LENGTH)), KEYS, seed=3) > 0]
    allowed = to_dense(parse(mask), masks, BATCH, HEADS, LENGTH, KEYS)
    options: dict[str, Any] = {"bias": draw(1, HEADS, LENGTH, KEYS, seed=4), "slopes": draw(HEADS, seed=5) / 9}
    for given in ({}, options, {"softcap": 2.0}):
        out = compiled(OPERANDS, masks, weight=weight, mask=mask, **given)
        assert relative_l2(out.double(), formula(*OPERANDS, allowed, weight, "none", **given)) <= 5e-6


def test_a_row_without_keys_is_zero_unless_its_sum_divides_it() -> None:
    masks = [torch.zeros(BATCH, KEYS, dtype=torch.bool)]
    assert not compiled(OPERANDS, masks, weight="sigmoid", mask="keys(0)").any()
    assert not compiled(OPERANDS, masks, weight="exp", mask="keys(0)", normaliser="sum_eps", constant=1e-8).any()
    assert compiled(OPERANDS, masks, weight="exp", mask="keys(0)", normaliser="sum").isnan().all()


@pytest.mark.parametrize("weight", ["exp", "sigmoid", "elu1"])
def test_scores_too_large_for_an_exponential(weight: str) -> None:
    query, key, value = OPERANDS
    big = (query * 1e3, key, value.abs())
    wanted = formula(*big, torch.ones(1), weight, "none").float()
    out = compiled(big, [], weight=weight)
    assert torch.equal(out.isinf(), wanted.isinf())
    finite = out.isfinite()
    assert relative_l2(out[finite].double(), wanted[finite].double()) <= 1e-5


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_query_that_is_no_number_spoils_its_row_and_no_other(weight: str) -> None:
    query, key, value = (operand.clone() for operand in OPERANDS)
    query[0, 1, 5] = math.nan
    out = compiled((query, key, value), [], weight=weight)
    assert out[0, 1, 5].isnan().all()
    assert out.isnan().sum() == SIZE
