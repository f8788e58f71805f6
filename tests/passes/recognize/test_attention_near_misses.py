"""What looks like attention and is none is refused with the reason; what is nearly a mask keeps its own meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ir.graphs import numbers
from tests.passes.recognize.attention_support import (
    BATCH,
    DIM,
    HEADS,
    KEYS,
    LENGTH,
    MASK,
    SCALE,
    K,
    Q,
    V,
    formula,
    found,
    recognized,
    refused,
    sites,
)

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(LENGTH, KEYS).tril().bool()


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


def causal() -> Tensor:
    return torch.arange(KEYS)[None] <= torch.arange(LENGTH)[:, None]


# ---- no attention: refused, with the reason ----------------------------------------------------------------------


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v, weights


def scores_used(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * SCALE
    return attend(scores, v), scores.amax(-1)


def weights_averaged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v, weights.mean(1)


def sinks_kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    column = q[0, :, 0, 0].reshape(1, -1, 1, 1).expand(BATCH, -1, LENGTH, -1)
    return torch.cat([q @ k.mT, column], -1).softmax(-1) @ torch.cat([v, v[:, :, :1]], -2)


def keys_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1)[..., :-1] @ v[:, :, :-1]


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "softmax over the queries": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        "softmax runs over dim -2, not over the keys",
    ),
    "softmax over the heads": (
        lambda q, k, v: (q @ k.mT).softmax(1) @ v,
        "softmax runs over dim -3, not over the keys",
    ),
    "weights returned": (weights_returned, "attention weights are used outside the attention"),
    "weights averaged": (weights_averaged, "attention weights are used outside the attention"),
    "scores used": (scores_used, "attention scores are used outside the attention"),
    "scaled after the softcap": (
        lambda q, k, v: attend(20 * (q @ k.mT / 20).tanh() * SCALE * 3, v),
        "the scores are scaled after the softcap",
    ),
    "capped after the mask": (
        lambda q, k, v: attend(20 * ((q @ k.mT).masked_fill(~causal(), -50.0) / 20).tanh(), v),
        "the softcap comes after the mask",
    ),
    "two caps": (
        lambda q, k, v: attend(30 * (q @ k.mT / 20).tanh(), v),
        "tanh is divided by 20 inside and multiplied by 30 outside",
    ),
    "scaled after a finite mask": (
        lambda q, k, v: attend((q @ k.mT).masked_fill(~causal(), -5.0) * SCALE, v),
        "the scores are scaled after a finite mask value",
    ),
    "column kept": (sinks_kept, "columns of the attention weights are dropped or added"),
    "keys dropped": (keys_dropped, "columns of the attention weights are dropped or added"),
    "another function between": (
        lambda q, k, v: attend((q @ k.mT).relu(), v),
        "expected aten.matmul.default, found aten.relu.default",
    ),
    "scores chosen from another tensor": (
        lambda q, k, v: attend(torch.where(causal(), q @ k.mT, (q @ k.mT).sin()), v),
        "",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(function: Callable[..., Any], reason: str) -> None:
    assert reason in refused(function)


# ---- attention with another meaning: found, with that meaning ----------------------------------------------------


def test_permuted_keys_are_the_keys_of_another_order() -> None:
    """pytorch#195320: a key whose permutation is not the transpose of its last dims must not be bound as it is."""
    k = numbers(BATCH, DIM, HEADS, KEYS, seed=2)
    site = found(
        lambda q, k, v: attend(q @ k.permute(0, 2, 1, 3) * SCALE, v),
        (Q, k, V),
        expected=formula(Q, k.permute(0, 2, 3, 1), V),
    )
    assert tuple(site["key"].meta["val"].shape) == (BATCH, HEADS, KEYS, DIM)


def test_keys_without_a_transpose() -> None:
    square = numbers(BATCH, HEADS, DIM, DIM, seed=4)
    found(lambda q, k, v: attend(q @ k * SCALE, v), (Q, square, square), expected=formula(Q, square.mT, square))


NEARLY: dict[str, Callable[[], Tensor]] = {
    "one key more": lambda: causal() | ((torch.arange(LENGTH)[:, None] == 0) & (torch.arange(KEYS)[None] == 3)),
    "one key less": lambda: causal() & ~((torch.arange(LENGTH)[:, None] == 4) & (torch.arange(KEYS)[None] == 1)),
    "one diagonal more": lambda: torch.arange(KEYS)[None] <= torch.arange(LENGTH)[:, None] + 1,
    "itself left out": lambda: (
        (torch.arange(KEYS)[None] < torch.arange(LENGTH)[:, None]) | (torch.arange(KEYS)[None] == 0)
    ),
    "the wrong way round": lambda: torch.arange(KEYS)[None] >= torch.arange(LENGTH)[:, None],
    "causal for the first rows": lambda: causal() | (torch.arange(LENGTH)[:, None] >= 3),
}


@pytest.mark.parametrize("allowed", NEARLY.values(), ids=NEARLY)
def test_nearly_causal_is_not_causal(allowed: Callable[[], Tensor]) -> None:
    site = found(
        lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(~allowed(), -INF), v),
        expected=formula(Q, K, V, allowed=allowed()),
    )
    assert site["mask"] != "band(None,0)"


def test_constant_mask_with_one_entry_changed_is_not_causal() -> None:
    written = torch.ones(LENGTH, KEYS).tril().bool()
    written[0, 4] = True
    site = found(
        lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(~written, -INF), v),
        expected=formula(Q, K, V, allowed=written),
    )
    assert site["mask"] != "band(None,0)"


def test_mask_that_is_causal_in_the_example_only_stays_a_tensor() -> None:
    """An input may hold anything at the next call."""
    site = found(
        lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill(~m, -INF), v),
        (Q, K, V, CAUSAL),
        expected=formula(Q, K, V, allowed=CAUSAL),
    )
    assert site["mask"] != "band(None,0)" and site["mask_tensors"]


@pytest.mark.parametrize("fill", [-1e4, -5.0])
def test_finite_number_written_where_masked_keeps_its_weight(fill: float) -> None:
    function = masked_with(fill)
    program, _ = recognized(function, (Q, K, V))
    (site,) = sites(program)
    assert site["mask"] == "band(None,0)" and site["mask_fill"] == fill
    found(function, expected=formula(Q, K, V, allowed=CAUSAL, fill=fill))


def masked_with(fill: float) -> Callable[..., Tensor]:
    return lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(~causal(), fill), v)


@pytest.mark.parametrize("fill", [-1e4, -5.0])
def test_finite_number_added_leaves_something_of_the_score(fill: float) -> None:
    addend = torch.zeros(LENGTH, KEYS).masked_fill(~CAUSAL, fill)
    site = found(
        lambda q, k, v: attend(q @ k.mT * SCALE + torch.zeros(LENGTH, KEYS).masked_fill(~causal(), fill), v),
        expected=formula(Q, K, V, bias=addend),
    )
    assert site["mask"] == "all" and site["bias"] is not None


def test_masks_of_different_values_over_rows_that_may_be_empty_are_refused() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = (q @ k.mT * SCALE).masked_fill(~causal(), -INF)
        return attend(scores.masked_fill((m == 0)[:, None, None], -1e4), v)

    assert (
        refused(function, (Q, K, V, MASK)) == "several masks write different values, and a row may have no key at all"
    )


def test_dropout_is_refused() -> None:
    from regraft.ir.capture import CaptureError

    with pytest.raises(CaptureError, match="inference"):
        recognized(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1), (Q, K, V))


def test_softmax_that_is_no_attention_is_silent_or_refused() -> None:
    program, session = recognized(lambda x: x.softmax(-1), (Q,))
    assert not sites(program) and not session.log.refusals
