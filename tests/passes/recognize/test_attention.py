"""Attention is found in every spelling, with the meaning of its source: scale, heads, masks, biases, sinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ir.graphs import numbers
from tests.passes.recognize.attention_support import (
    BATCH,
    DIM,
    HEADS,
    KEYS,
    LENGTH,
    LOWEST,
    MASK,
    SCALE,
    K,
    Module,
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
)
from tests.support import run

INF = math.inf
CAUSAL = torch.ones(LENGTH, KEYS).tril().bool()


# ---- scale -----------------------------------------------------------------------------------------------------

SCALES: dict[str, Callable[..., Tensor]] = {
    "multiplied": lambda q, k, v: attend(q @ k.mT * SCALE, v),
    "number first": lambda q, k, v: attend(SCALE * (q @ k.mT), v),
    "divided": lambda q, k, v: attend(q @ k.mT / math.sqrt(DIM), v),
    "on the query": lambda q, k, v: attend(q * SCALE @ k.mT, v),
    "query divided": lambda q, k, v: attend(q / math.sqrt(DIM) @ k.mT, v),
    "on the key": lambda q, k, v: attend(q @ (k * SCALE).mT, v),
    "on the transposed key": lambda q, k, v: attend(q @ (k.mT * SCALE), v),
    "half on each": lambda q, k, v: attend((q * SCALE**0.5) @ (k * SCALE**0.5).mT, v),
    "twice": lambda q, k, v: attend(q @ k.mT * 2 * (SCALE / 2), v),
    "by a tensor": lambda q, k, v: attend(q @ k.mT / torch.full([], math.sqrt(DIM)), v),
    "with fp32 softmax": lambda q, k, v: (q @ k.mT * SCALE).softmax(-1, torch.float32).to(q.dtype) @ v,
    "with the maximum taken off": lambda q, k, v: attend((s := q @ k.mT * SCALE) - s.amax(-1, keepdim=True), v),
    "with the maximum of max": lambda q, k, v: attend((s := q @ k.mT * SCALE) - s.max(-1, keepdim=True).values, v),
}


@pytest.mark.parametrize("function", SCALES.values(), ids=SCALES)
def test_scale(function: Callable[..., Tensor]) -> None:
    site = found(function, expected=formula(Q, K, V))
    assert site["scale"] == pytest.approx(SCALE) and site["mask"] == "all"
    assert site["bias"] is None and site["softcap"] == 0


def test_without_scale() -> None:
    assert found(lambda q, k, v: attend(q @ k.mT, v), expected=formula(Q, K, V, 1.0))["scale"] == 1.0


def test_softmax_in_fp32_of_bf16_scores() -> None:
    args = tuple(t.bfloat16() for t in (Q, K, V))
    program, _ = recognized(lambda q, k, v: (q @ k.mT * SCALE).float().softmax(-1).to(q.dtype) @ v, args)
    assert len(sites(program)) == 1
    result = run(program, args)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), formula(*args), rtol=2e-2, atol=2e-2)


# ---- products --------------------------------------------------------------------------------------------------


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(BATCH * HEADS, LENGTH, KEYS)
    scores = torch.baddbmm(empty, flat(q), flat(k).mT, beta=0.0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), flat(v)).view(BATCH, HEADS, LENGTH, DIM)


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "bmm": lambda q, k, v: torch.bmm((torch.bmm(flat(q), flat(k).mT) * SCALE).softmax(-1), flat(v)).view(q.shape),
    "baddbmm": by_baddbmm,
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1), v
    ),
    "einsum, heads third": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        (torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)) * SCALE).softmax(-1),
        v.transpose(1, 2),
    ).transpose(1, 2),
    "key transposed by permute": lambda q, k, v: attend(q @ k.permute(0, 1, 3, 2) * SCALE, v),
    "batch and heads in one dim": lambda q, k, v: attend(flat(q) @ flat(k).mT * SCALE, flat(v)).view(q.shape),
}


@pytest.mark.parametrize("function", PRODUCTS.values(), ids=PRODUCTS)
def test_product(function: Callable[..., Tensor]) -> None:
    assert found(function, expected=formula(Q, K, V))["scale"] == pytest.approx(SCALE)


def test_one_head_without_a_batch() -> None:
    args = (Q[0, 0], K[0, 0], V[0, 0])
    found(lambda q, k, v: attend(q @ k.mT * SCALE, v), args, expected=formula(Q, K, V)[0, 0])


# ---- grouped queries -------------------------------------------------------------------------------------------

K2, V2 = K[:, :2], V[:, :2]


def repeat_kv(x: Tensor) -> Tensor:
    return x[:, :, None].expand(BATCH, 2, 2, KEYS, DIM).reshape(BATCH, HEADS, KEYS, DIM)


def by_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.view(BATCH, 2, 2, LENGTH, DIM)
    return (attend(grouped @ k[:, :, None].mT * SCALE, v[:, :, None])).view(q.shape)


def by_grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.view(BATCH, 2, 2, LENGTH, DIM)
    weights = (torch.einsum("bgrqd,bgkd->bgrqk", grouped, k) * SCALE).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).reshape(q.shape)


GROUPS: dict[str, Callable[..., Tensor]] = {
    "expand and reshape": lambda q, k, v: attend(q @ repeat_kv(k).mT * SCALE, repeat_kv(v)),
    "repeat_interleave": lambda q, k, v: attend(q @ k.repeat_interleave(2, 1).mT * SCALE, v.repeat_interleave(2, 1)),
    "broadcasting in five dims": by_groups,
    "einsum over groups": by_grouped_einsum,
    "fp32 and mask": lambda q, k, v: (
        (q @ repeat_kv(k).mT * SCALE + torch.zeros(1).masked_fill(~CAUSAL, LOWEST)).softmax(-1, torch.float32)
        @ repeat_kv(v)
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_queries_keep_their_few_keys(name: str) -> None:
    allowed = CAUSAL if "mask" in name else None
    site = found(GROUPS[name], (Q, K2, V2), expected=formula(Q, K2, V2, allowed=allowed))
    assert site["key"].meta["val"].shape[1] == site["value"].meta["val"].shape[1] == 2


def test_one_key_head_for_all() -> None:
    args = (Q, K[:, :1], V[:, :1])
    site = found(lambda q, k, v: attend(q @ k.mT * SCALE, v), args, expected=formula(*args))
    assert site["key"].meta["val"].shape[1] == 1


# ---- projections -----------------------------------------------------------------------------------------------

X = numbers(BATCH, LENGTH, HEADS * DIM, seed=5)


def packed_weight() -> Tensor:
    return numbers(3 * HEADS * DIM, HEADS * DIM, seed=6) * 0.2


def heads_of(x: Tensor) -> Tensor:
    return x.view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)


def from_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT * SCALE, v).transpose(1, 2).reshape(BATCH, LENGTH, HEADS * DIM)


PACKED: dict[str, Callable[..., Tensor]] = {
    "split": lambda m, x: from_parts(*map(heads_of, F.linear(x, m.weight).split(HEADS * DIM, -1))),
    "chunk": lambda m, x: from_parts(*map(heads_of, F.linear(x, m.weight).chunk(3, -1))),
    "timm": lambda m, x: from_parts(
        *F.linear(x, m.weight).reshape(BATCH, LENGTH, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    ),
}


@pytest.mark.parametrize("function", PACKED.values(), ids=PACKED)
def test_packed_projection(function: Callable[..., Tensor]) -> None:
    q, k, v = map(heads_of, F.linear(X, packed_weight()).chunk(3, -1))
    expected = formula(q, k, v).transpose(1, 2).reshape(X.shape)
    program, _ = recognized(model := Module(function, weight=packed_weight()), (X,))
    assert len(sites(program)) == 1
    torch.testing.assert_close(run(program, (X,)), model(X).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(program, (X,)).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_module(need_weights: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True).eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x, x, x, need_weights=need_weights)[0]
            return result

    program, _ = recognized(model := Wrapped(), (X,))
    assert len(sites(program)) == 1
    torch.testing.assert_close(run(program, (X,)), model(X).detach(), rtol=1e-5, atol=1e-5)


# ---- PyTorch's own operator ------------------------------------------------------------------------------------

sdpa = F.scaled_dot_product_attention
FLOAT_MASK = torch.zeros(BATCH, 1, LENGTH, KEYS).masked_fill((MASK == 0)[:, None, None], LOWEST)


def test_sdpa() -> None:
    site = found(lambda q, k, v: sdpa(q, k, v), expected=formula(Q, K, V))
    assert (site["mask"], site["empty_rows"]) == ("all", "zero")


def test_sdpa_with_a_scale_of_its_own() -> None:
    assert found(lambda q, k, v: sdpa(q, k, v, scale=0.5), expected=formula(Q, K, V, 0.5))["scale"] == 0.5


def test_sdpa_causal() -> None:
    site = found(lambda q, k, v: sdpa(q, k, v, is_causal=True), expected=formula(Q, K, V, allowed=CAUSAL))
    assert site["mask"] == "band(None,0)"


def test_sdpa_causal_with_fewer_queries_counts_from_the_first_key() -> None:
    args = (Q[:, :, :3], K, V)
    found(lambda q, k, v: sdpa(q, k, v, is_causal=True), args, expected=formula(*args, allowed=CAUSAL[:3]))


def test_sdpa_grouped() -> None:
    site = found(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (Q, K2, V2), expected=formula(Q, K2, V2))
    assert site["key"].meta["val"].shape[1] == 2


def test_sdpa_with_repeated_heads_reads_the_few() -> None:
    site = found(lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v)), (Q, K2, V2), expected=formula(Q, K2, V2))
    assert site["key"].meta["val"].shape[1] == 2


def test_sdpa_with_a_padding_mask() -> None:
    allowed = (MASK != 0)[:, None, None]
    site = found(
        lambda q, k, v, m: sdpa(q, k, v, attn_mask=(m != 0)[:, None, None].expand(-1, 1, LENGTH, -1)),
        (Q, K, V, MASK),
        expected=formula(Q, K, V, allowed=allowed),
    )
    assert site["mask"] == "keys(0)"


def test_sdpa_with_a_float_mask_given_as_input_keeps_it_as_bias() -> None:
    bias = numbers(BATCH, 1, LENGTH, KEYS, seed=7)
    site = found(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), (Q, K, V, bias), expected=formula(Q, K, V, bias=bias))
    assert site["bias"] is not None and site["mask"] == "all"


def test_sdpa_of_three_dims() -> None:
    args = (Q[0], K[0], V[0])
    found(lambda q, k, v: sdpa(q, k, v), args, expected=formula(Q, K, V)[0])


# ---- softcap, biases, sinks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capped", [lambda s: 20 * (s / 20).tanh(), lambda s: (s * 0.05).tanh() * 20], ids=["divided", "multiplied"]
)
def test_softcap(capped: Callable[[Tensor], Tensor]) -> None:
    site = found(
        lambda q, k, v: attend(capped(q @ k.mT * SCALE) + additive(causal_of(q, k)), v),
        expected=formula(Q, K, V, softcap=20, allowed=CAUSAL),
    )
    assert site["softcap"] == pytest.approx(20) and site["mask"] == "band(None,0)"


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def test_alibi() -> None:
    def function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = places(q, k)
        scores = q @ k.mT * SCALE + m.slopes[:, None, None] * (columns - rows)
        return attend(scores.masked_fill(~causal_of(q, k), -INF), v)

    rows, columns = places(Q, K)
    expected = formula(Q, K, V, bias=SLOPES[:, None, None] * (columns - rows), allowed=CAUSAL)
    program, _ = recognized(Module(function, slopes=SLOPES), (Q, K, V))
    (site,) = sites(program)
    assert site["slopes"] is not None and site["bias"] is None and site["mask"] == "band(None,0)"
    torch.testing.assert_close(run(program, (Q, K, V)).double(), expected, rtol=1e-5, atol=1e-5)


def test_relative_position_bias() -> None:
    """T5's way: a table of one number a head for each distance."""
    table = numbers(2 * LENGTH - 1, HEADS, seed=8)

    def function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = places(q, k)
        bias = F.embedding(columns - rows + LENGTH - 1, m.table).permute(2, 0, 1)[None]
        return attend(q @ k.mT + bias, v)

    rows, columns = places(Q, K)
    expected = formula(Q, K, V, 1.0, bias=table[columns - rows + LENGTH - 1].permute(2, 0, 1))
    program, _ = recognized(Module(function, table=table), (Q, K, V))
    (site,) = sites(program)
    assert site["bias"] is not None and site["mask"] == "all"
    torch.testing.assert_close(run(program, (Q, K, V)).double(), expected, rtol=1e-5, atol=1e-5)


def test_bias_and_mask_in_one_sum() -> None:
    bias = numbers(1, HEADS, LENGTH, KEYS, seed=8)
    site = found(
        lambda q, k, v, b: attend(q @ k.mT * SCALE + b.tanh() + additive(causal_of(q, k)), v),
        (Q, K, V, bias),
        expected=formula(Q, K, V, bias=bias.tanh(), allowed=CAUSAL),
    )
    assert site["bias"] is not None and site["mask"] == "band(None,0)"


def test_bias_before_the_scale_is_scaled_too() -> None:
    bias = numbers(1, HEADS, LENGTH, KEYS, seed=8)
    found(
        lambda q, k, v, b: attend((q @ k.mT + b) * SCALE, v),
        (Q, K, V, bias),
        expected=formula(Q, K, V, bias=bias * SCALE),
    )


def test_sinks_of_heads_in_two_dims() -> None:
    sinks = numbers(HEADS, seed=10)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
        column = sinks.reshape(1, 2, 2, 1, 1).expand(q.shape[0], -1, -1, q.shape[-2], -1)
        return (torch.cat([q @ k.mT * SCALE, column], -1).softmax(-1)[..., :-1] @ v).flatten(1, 2)

    program, _ = recognized(function, (Q, K, V))
    (site,) = sites(program)
    assert site["sinks"] is not None
    torch.testing.assert_close(run(program, (Q, K, V)).double(), formula(Q, K, V, sinks=sinks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("minus_maximum", [False, True])
def test_learnable_sinks(minus_maximum: bool) -> None:
    """gpt-oss: a logit a head that takes weight and gives nothing."""
    sinks = numbers(HEADS, seed=10)

    def function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE + additive(causal_of(q, k))
        column = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        logits = torch.cat([scores, column], -1)
        if minus_maximum:
            logits = logits - logits.max(-1, keepdim=True).values
        return logits.softmax(-1)[..., :-1] @ v

    program, _ = recognized(Module(function, sinks=sinks), (Q, K, V))
    (site,) = sites(program)
    assert site["sinks"] is not None and site["mask"] == "band(None,0)"
    expected = formula(Q, K, V, allowed=CAUSAL, sinks=sinks)
    torch.testing.assert_close(run(program, (Q, K, V)).double(), expected, rtol=1e-5, atol=1e-5)


def test_heads_repeated_before_they_come_to_the_front() -> None:
    """``[batch, length, kv_heads, size]`` is repeated, and then permuted (the original Llama code)."""
    query = numbers(BATCH, LENGTH, HEADS, DIM, seed=1)
    key, value = (numbers(BATCH, LENGTH, 2, DIM, seed=seed) for seed in (2, 3))

    def repeated(x: Tensor) -> Tensor:
        return x[:, :, :, None].expand(BATCH, LENGTH, 2, 2, DIM).reshape(BATCH, LENGTH, HEADS, DIM)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, repeated(k), repeated(v)))
        return attend(q @ k.transpose(2, 3) * SCALE, v)

    site = found(function, (query, key, value))
    assert site["key"].meta["val"].shape[1] == site["value"].meta["val"].shape[1] == 2


def test_one_key_head_for_all_queries_by_einsum() -> None:
    query, key, value = numbers(BATCH, LENGTH, HEADS, DIM, seed=1), K[:, 0], V[:, 0]
    site = found(
        lambda q, k, v: torch.einsum("bhqk,bkd->bqhd", torch.einsum("bqhd,bkd->bhqk", q, k).softmax(-1), v),
        (query, key, value),
    )
    assert site["key"].meta["val"].shape[1] == 1


def test_scores_with_the_keys_first() -> None:
    found(lambda q, k, v: attend((k @ q.mT * SCALE).mT, v), expected=formula(Q, K, V))


def test_scores_in_fp32_of_narrow_values() -> None:
    """GPT-Neo widens query and key, and rounds the weights to the values' type."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.float() @ k.float().mT * SCALE).softmax(-1)
        return weights.to(v.dtype) @ v

    args = tuple(x.to(torch.bfloat16) for x in (Q, K, V))
    program, _ = recognized(function, args)
    (site,) = sites(program)
    assert {site[name].meta["val"].dtype for name in ("query", "key", "value")} == {torch.float32}
    torch.testing.assert_close(run(program, args), function(*args), rtol=2e-2, atol=2e-2)
