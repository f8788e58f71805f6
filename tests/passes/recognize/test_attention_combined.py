"""Several maskings of one attention: what they mean together, in the order of the source."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    LOWEST,
    SCALE,
    K,
    Module,
    Q,
    V,
    additive,
    attend,
    causal_of,
    found,
    recognized,
    refused,
    sites,
)
from tests.support import run

INF = math.inf
#: Padding on the left: the first queries see no key at all under a causal mask.
LEFT = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
BIAS = numbers(1, HEADS, LENGTH, KEYS, seed=8)
Step = Callable[..., Tensor]


def padding(keep: Tensor) -> Tensor:
    return keep[:, None, None, :] != 0


def add_causal(fill: float) -> Step:
    return lambda s, q, k, keep: s + additive(causal_of(q, k), fill)


def write_causal(fill: float) -> Step:
    return lambda s, q, k, keep: s.masked_fill(~causal_of(q, k), fill)


def add_padding(fill: float) -> Step:
    return lambda s, q, k, keep: s + torch.zeros(BATCH, 1, 1, KEYS).masked_fill(~padding(keep), fill)


def write_padding(fill: float) -> Step:
    return lambda s, q, k, keep: s.masked_fill(~padding(keep), fill)


def at_least_lowest(s: Tensor, q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
    return torch.max(s, torch.tensor(LOWEST))


def attention(*steps: Step) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE
        for step in steps:
            scores = step(scores, q, k, keep)
        return attend(scores, v)

    return function


@pytest.mark.parametrize(
    ("steps", "mask", "fill"),
    [
        ((add_causal(-INF), add_padding(-INF)), "band(None,0) & keys(0)", None),
        ((write_causal(-INF), add_padding(-INF)), "band(None,0) & keys(0)", None),
        ((write_causal(-1e4), write_padding(-1e4)), "band(None,0) & keys(0)", -1e4),
        ((write_causal(LOWEST), write_padding(LOWEST)), "band(None,0) & keys(0)", LOWEST),
        ((add_causal(LOWEST), add_padding(LOWEST), at_least_lowest), "band(None,0) & keys(0)", LOWEST),
        ((add_padding(-INF), at_least_lowest), "keys(0)", LOWEST),
    ],
)
def test_masks_that_are_one_predicate(steps: tuple[Step, ...], mask: str, fill: float | None) -> None:
    site = found(attention(*steps), (Q, K, V, LEFT))
    assert (site["mask"], site["mask_fill"], site["bias"]) == (mask, fill, None)


@pytest.mark.parametrize(
    "steps",
    [
        (add_causal(LOWEST), add_padding(LOWEST)),  # minus infinity where both mask
        (write_causal(LOWEST), add_padding(LOWEST)),
        (write_causal(LOWEST), add_padding(-INF)),
        (write_causal(-INF), add_padding(LOWEST)),
        (add_causal(LOWEST), add_padding(-1e9)),
    ],
)
def test_masks_that_add_up_stay_as_they_are_written(steps: tuple[Step, ...]) -> None:
    site = found(attention(*steps), (Q, K, V, LEFT))
    assert site["mask"] == "all" and site["bias"] is not None


@pytest.mark.parametrize(
    "steps",
    [
        (write_causal(-1e4), add_padding(-1e9)),
        (add_padding(-1e9), write_causal(-1e4)),
        (write_causal(-1e4), write_padding(LOWEST)),
        (write_causal(-3.0), lambda s, q, k, keep: s + BIAS),
    ],
)
def test_values_that_do_not_combine_are_refused(steps: tuple[Step, ...]) -> None:
    reason = refused(attention(*steps), (Q, K, V, LEFT))
    assert reason == "several masks write different values, and a row may have no key at all"


def test_bias_that_is_an_input_may_be_a_mask() -> None:
    hides = torch.zeros(BATCH, 1, 1, KEYS).masked_fill(~padding(LEFT), -INF)
    site = found(lambda q, k, v, b: attend(q @ k.mT * SCALE + b + additive(causal_of(q, k)), v), (Q, K, V, hides))
    assert site["mask"] == "all"
    site = found(lambda q, k, v, b: attend(q @ k.mT * SCALE + b + additive(causal_of(q, k), -INF), v), (Q, K, V, hides))
    assert site["mask"] == "band(None,0)" and site["bias"] is not None


def test_clamp_that_changes_scores_is_refused() -> None:
    reason = refused(lambda q, k, v: attend((q @ k.mT * SCALE).clamp(min=-1.0), v))
    assert reason == "the scores are clamped to -1 from below"


@pytest.mark.parametrize(
    "blend",
    [
        lambda scores, keep: scores * keep + -1e4 * (1 - keep),
        lambda scores, keep: scores * keep - 1e4 * (1 - keep),
    ],
)
def test_scores_and_a_number_blended_by_a_mask(blend: Callable[..., Tensor]) -> None:
    site = found(lambda q, k, v: attend(blend(q @ k.mT * SCALE, causal_of(q, k).float()), v))
    assert (site["mask"], site["mask_fill"]) == ("band(None,0)", -1e4)


def test_blend_by_other_numbers_is_refused() -> None:
    weights = numbers(1, 1, LENGTH, KEYS, seed=9).sigmoid()
    reason = refused(lambda q, k, v, w: attend(q @ k.mT * w - 1e4 * (1 - w), v), (Q, K, V, weights))
    assert "may hold other numbers than 0 and 1" in reason


# ---- additions and factors of other shapes -----------------------------------------------------------------------


def test_bias_of_merged_heads_and_mask_of_split_ones() -> None:
    bias = numbers(BATCH * HEADS, 1, KEYS, seed=10)

    def function(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(b.tanh(), q, k.mT, beta=1.0, alpha=SCALE).view(BATCH, HEADS, LENGTH, KEYS)
        weights = (scores + additive(causal_of(scores, scores))).softmax(-1)
        return torch.bmm(weights.view(BATCH * HEADS, LENGTH, KEYS), v)

    site = found(function, (Q, K, V, bias))
    assert site["mask"] == "band(None,0)" and tuple(site["bias"].meta["val"].shape) == (BATCH, HEADS, LENGTH, KEYS)


def test_bias_of_rows_and_columns_of_an_image() -> None:
    """Keys are the places of an image, and the bias is added in its dims (ViTDet, SAM)."""
    q, k, v = (numbers(BATCH, HEADS, 6, DIM, seed=seed) for seed in (1, 2, 3))
    tall, wide = numbers(BATCH, HEADS, 6, 2, 1, seed=4), numbers(BATCH, HEADS, 6, 1, 3, seed=5)

    def function(q: Tensor, k: Tensor, v: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
        scores = (q @ k.mT * SCALE).view(BATCH, HEADS, 6, 2, 3) + tall + wide
        return attend(scores.view(BATCH, HEADS, 6, 6), v)

    assert found(function, (q, k, v, tall, wide))["bias"] is not None


def test_mask_of_windows() -> None:
    """Windows are split off from the batch to be masked each by its own mask (Swin)."""
    mask = torch.zeros(1, BATCH, 1, LENGTH, KEYS).masked_fill(numbers(1, BATCH, 1, LENGTH, KEYS, seed=6) > 0, -100.0)

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT * SCALE).view(1, BATCH, HEADS, LENGTH, KEYS) + mask
        return attend(scores.view(BATCH, HEADS, LENGTH, KEYS), v)

    assert found(function, (Q, K, V, mask))["bias"] is not None


def test_subtracted_mask() -> None:
    site = found(lambda q, k, v, keep: attend(q @ k.mT - 65500 * (1.0 - keep[:, None, None]), v), (Q, K, V, LEFT))
    assert site["bias"] is not None


@pytest.mark.parametrize(
    "scaled", [lambda s, m: s * m.factor.exp(), lambda s, m: s / m.factor.exp(), lambda s, m: m.factor[0, 0, 0] * s]
)
def test_scale_that_is_a_tensor(scaled: Callable[..., Tensor]) -> None:
    """A temperature of each head (Swin 2) is the query's."""
    module = Module(lambda m, q, k, v: attend(scaled(q @ k.mT, m), v), factor=numbers(HEADS, 1, 1, seed=7))
    program, _ = recognized(module, (Q, K, V))
    assert len(sites(program)) == 1
    torch.testing.assert_close(run(program, (Q, K, V)), module(Q, K, V), rtol=1e-5, atol=1e-5)


def test_factor_of_each_key_is_refused() -> None:
    factors = numbers(KEYS, seed=11)
    reason = refused(lambda q, k, v, f: attend(q @ k.mT * f, v), (Q, K, V, factors))
    assert reason == "the scores are scaled by a tensor that is not one number a query"


def test_softmax_over_a_part_of_the_keys_is_refused() -> None:
    q, k, v = (numbers(BATCH, HEADS, 6, DIM, seed=seed) for seed in (1, 2, 3))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).view(BATCH, HEADS, 6, 2, 3).softmax(-1).view(BATCH, HEADS, 6, 6) @ v

    assert refused(function, (q, k, v)) == "the softmax does not run over all keys"
