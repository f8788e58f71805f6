"""Masks of an attention become predicates, and rows without a key keep the meaning of their source."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ir.graphs import numbers
from tests.passes.recognize.attention_support import (
    BATCH,
    KEYS,
    LENGTH,
    LOWEST,
    MASK,
    SCALE,
    K,
    Q,
    V,
    additive,
    attend,
    causal_of,
    formula,
    found,
    places,
    recognized,
    sites,
    window,
)
from tests.support import run

INF = math.inf
CAUSAL = torch.ones(LENGTH, KEYS).tril().bool()


sdpa = F.scaled_dot_product_attention


# ---- masks -----------------------------------------------------------------------------------------------------


CAUSAL_SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "added": lambda q, k, v: attend(q @ k.mT * SCALE + additive(causal_of(q, k)), v),
    "mask first": lambda q, k, v: attend(additive(causal_of(q, k)) + q @ k.mT * SCALE, v),
    "added before the scale": lambda q, k, v: attend((q @ k.mT + additive(causal_of(q, k), -INF)) * SCALE, v),
    "minus infinity": lambda q, k, v: attend(q @ k.mT * SCALE + additive(causal_of(q, k), -INF), v),
    "masked_fill": lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(~causal_of(q, k), -INF), v),
    "masked_fill before the scale": lambda q, k, v: attend((q @ k.mT).masked_fill(~causal_of(q, k), -INF) * SCALE, v),
    "where": lambda q, k, v: attend(torch.where(causal_of(q, k), q @ k.mT * SCALE, -INF), v),
    "where, other way": lambda q, k, v: attend(torch.where(~causal_of(q, k), -INF, q @ k.mT * SCALE), v),
    "where of a tensor": lambda q, k, v: attend(
        torch.where(causal_of(q, k), q @ k.mT * SCALE, torch.full([], LOWEST)), v
    ),
    "tril": lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(torch.ones(LENGTH, KEYS).tril() == 0, -INF), v),
    "triu of minus infinity": lambda q, k, v: attend(q @ k.mT * SCALE + torch.full((LENGTH, KEYS), -INF).triu(1), v),
    "very low number": lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(~causal_of(q, k), LOWEST), v),
}


@pytest.mark.parametrize("function", CAUSAL_SPELLINGS.values(), ids=CAUSAL_SPELLINGS)
def test_causal_mask(function: Callable[..., Tensor]) -> None:
    site = found(function, expected=formula(Q, K, V, allowed=CAUSAL))
    assert (site["mask"], site["mask_fill"], site["bias"]) == ("band(None,0)", None, None)
    assert site["scale"] == pytest.approx(SCALE)


def test_causal_buffer() -> None:
    """GPT-2's way: the mask is a constant of the model."""

    class Buffered(nn.Module):
        allowed: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("allowed", torch.ones(16, 16, dtype=torch.bool).tril()[None, None])

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = self.allowed[:, :, :LENGTH, :KEYS]
            return attend(torch.where(mask, q @ k.mT * SCALE, torch.full([], LOWEST)), v)

    program, _ = recognized(model := Buffered(), (Q, K, V))
    (site,) = sites(program)
    assert site["mask"] == "band(None,0)"
    torch.testing.assert_close(run(program, (Q, K, V)), model(Q, K, V), rtol=1e-5, atol=1e-5)


def prefixed(q: Tensor, k: Tensor) -> Tensor:
    rows, columns = places(q, k)
    return (columns <= rows) | (columns < 2)


@pytest.mark.parametrize(
    ("allowed", "mask"),
    [(window, "band(-2,0)"), (prefixed, "band(None,0) | prefix(2)")],
    ids=["sliding window", "prefix"],
)
@pytest.mark.parametrize("spelling", ["add", "fill"])
def test_mask_of_index_arithmetic(allowed: Callable[..., Tensor], mask: str, spelling: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE
        if spelling == "add":
            return attend(scores + additive(allowed(q, k)), v)
        return attend(scores.masked_fill(~allowed(q, k), -INF), v)

    assert found(function, expected=formula(Q, K, V, allowed=allowed(Q, K)))["mask"] == mask


def test_padding_mask_added() -> None:
    site = found(
        lambda q, k, v, m: attend(q @ k.mT * SCALE + (1.0 - m[:, None, None].float()) * LOWEST, v),
        (Q, K, V, MASK.bool()),
        expected=formula(Q, K, V, allowed=(MASK != 0)[:, None, None]),
    )
    assert site["mask"] == "keys(0)" and len(site["mask_tensors"]) == 1


def test_arithmetic_on_integers_is_no_mask_but_a_bias() -> None:
    """Nothing says that an integer input holds zeros and ones only."""
    site = found(
        lambda q, k, v, m: attend(q @ k.mT * SCALE + (1.0 - m[:, None, None].float()) * LOWEST, v),
        (Q, K, V, MASK),
        expected=formula(Q, K, V, allowed=(MASK != 0)[:, None, None]),
    )
    assert site["mask"] == "all" and site["bias"] is not None


def test_padding_and_causal_mask() -> None:
    site = found(
        lambda q, k, v, m: attend(
            (q @ k.mT * SCALE).masked_fill(~(causal_of(q, k) & (m != 0)[:, None, None]), -INF), v
        ),
        (Q, K, V, MASK),
        expected=formula(Q, K, V, allowed=CAUSAL & (MASK != 0)[:, None, None]),
    )
    assert site["mask"] == "band(None,0) & keys(0)"


def test_two_masks_become_one() -> None:
    site = found(
        lambda q, k, v, m: attend(
            (q @ k.mT * SCALE + additive(causal_of(q, k), -INF)).masked_fill((m == 0)[:, None, None], -INF), v
        ),
        (Q, K, V, MASK),
        expected=formula(Q, K, V, allowed=CAUSAL & (MASK != 0)[:, None, None]),
    )
    assert sorted(site["mask"].split(" & ")) == ["band(None,0)", "keys(0)"]


def test_packed_documents() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    same = ids[:, None, :, None] == ids[:, None, None, :]
    site = found(
        lambda q, k, v, d: attend(
            (q @ k.mT * SCALE).masked_fill(~((d[:, None, :, None] == d[:, None, None, :]) & causal_of(q, k)), -INF), v
        ),
        (Q, K, V, ids),
        expected=formula(Q, K, V, allowed=same & CAUSAL),
    )
    assert site["mask"] == "band(None,0) & same(0,0)"


def test_mask_of_unknown_origin_stays_a_tensor() -> None:
    allowed = numbers(BATCH, 1, LENGTH, KEYS, seed=9) > -0.5
    site = found(
        lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill(~m, -INF), v),
        (Q, K, V, allowed),
        expected=formula(Q, K, V, allowed=allowed),
    )
    assert "dense" in site["mask"]


# ---- rows without a key ----------------------------------------------------------------------------------------

EMPTY_ROWS = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])  # the second sequence is padding alone


@pytest.mark.parametrize(
    ("fill", "meaning"), [(-INF, "not a number"), (LOWEST, "the mean of all values"), (-1e4, "the mean of all values")]
)
def test_row_without_a_key_keeps_the_meaning_of_its_source(fill: float, meaning: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return attend((q @ k.mT * SCALE).masked_fill((m == 0)[:, None, None], fill), v)

    args = (Q, K, V, EMPTY_ROWS)
    found(function, args)
    program, _ = recognized(function, args)
    second = run(program, args)[1]
    if meaning == "not a number":
        assert second.isnan().all()
    else:
        torch.testing.assert_close(second, V[1].mean(-2, keepdim=True).expand_as(second), rtol=1e-5, atol=1e-5)


def test_row_without_a_key_is_zero_in_sdpa() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=(m != 0)[:, None, None].expand(-1, 1, LENGTH, -1))

    args = (Q, K, V, EMPTY_ROWS)
    site = found(function, args)
    assert site["empty_rows"] == "zero"
    assert not run(recognized(function, args)[0], args)[1].any()


def test_one_number_for_all_scores_has_a_dim_in_the_operator() -> None:
    shift = torch.tensor(0.5)
    site = found(lambda q, k, v, m: attend(q @ k.mT * SCALE + m, v), (Q, K, V, shift), expected=formula(Q, K, V))
    assert site["bias"].meta["val"].shape == (1,)


def test_a_number_that_a_narrower_bias_does_not_have_is_written_in_the_type_of_the_scores() -> None:
    lowest = torch.finfo(torch.float64).min
    seen = MASK[:, None, None] != 0
    query, key, value = (tensor.double() for tensor in (Q, K, V))

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE + torch.full((LENGTH, KEYS), -INF, dtype=torch.float32).triu(1)
        return attend(scores.masked_fill(~m, lowest), v)

    found(function, (query, key, value, seen), expected=formula(Q, K, V, allowed=CAUSAL & seen, fill=-INF))


def test_a_fill_in_the_shape_of_the_scores_is_a_number() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE
        return attend(torch.where(causal_of(q, k), scores, torch.full_like(scores, LOWEST)), v)

    assert found(function, expected=formula(Q, K, V, allowed=CAUSAL))["mask"] == "band(None,0)"


def test_a_row_that_is_zeroed_keeps_what_is_not_finite() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.where(m[:, None, :, None] != 0, (q @ k.mT * SCALE).softmax(-1), 0.0) @ v

    found(function, (Q, K, V, MASK))
    value = V.clone()
    value[0, 0, 2, 1] = float("nan")
    args = (Q, K, value, MASK)
    assert torch.equal(run(recognized(function, args)[0], args).isnan(), function(*args).isnan())
