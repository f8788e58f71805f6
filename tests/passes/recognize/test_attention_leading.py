"""Operands that broadcast to the scores, and scores of more dims than batch and heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ir.graphs import numbers
from tests.passes.recognize.attention_support import Module, attend, found, recognized, refused, sites
from tests.support import run

QUERIES, KEYS, DIM, SCALE = 5, 6, 8, 0.3
BATCH, FRAMES, HEADS = 2, 3, 4


def operands(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with these dims in front."""
    lengths = QUERIES, KEYS, KEYS
    q, k, v = (
        numbers(*front, n, DIM, seed=s) for s, (front, n) in enumerate(zip((query, key, value), lengths, strict=True))
    )
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT * SCALE, v)


def exact(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """The formula in fp64; a product of matrices broadcasts what is in front."""
    scores = q.double() @ k.double().mT * SCALE
    weights = (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v.double()


SHARED = {
    "one query for all batches": ((1, 4), (2, 4), (2, 4)),
    "queries without a batch": ((4,), (2, 4), (2, 4)),
    "one head of queries": ((2, 1), (2, 4), (2, 4)),
    "keys and values without a batch": ((2, 4), (4,), (4,)),
    "keys and values for all heads": ((2, 4), (), ()),
    "as many batches as heads": ((4, 4), (4,), (4,)),
    "values of one batch": ((2, 4), (2, 4), (1, 4)),
    "values without heads": ((2, 4), (2, 4), ()),
    "frames share the keys": ((2, 3, 4), (2, 1, 4), (2, 1, 4)),
    "batches share the keys of a frame": ((2, 3, 4), (3, 4), (3, 4)),
    "as many frames as batches": ((2, 2, 4), (2, 4), (2, 4)),
    "frames share the query": ((2, 1, 4), (2, 3, 4), (2, 3, 4)),
    "keys of a frame, values of a batch": ((2, 3, 4), (2, 3, 1), (2, 1, 4)),
    "batches without heads": ((6,), (), ()),
}


@pytest.mark.parametrize("fronts", SHARED.values(), ids=SHARED)
def test_operands_broadcast_as_in_a_product(fronts: tuple[tuple[int, ...], ...]) -> None:
    args = operands(*fronts)
    site = found(attention, args, expected=exact(*args))
    assert site["key"].meta["val"].shape[1] == site["value"].meta["val"].shape[1]


def test_key_and_value_have_one_number_of_heads() -> None:
    one_head_of_keys, one_of_values = ((2, 4), (2, 1), (2, 4)), ((2, 4), (2, 4), (2, 1))
    for fronts in (one_head_of_keys, one_of_values):
        args = operands(*fronts)
        site = found(attention, args, expected=exact(*args))
        assert [site[name].meta["val"].shape[1] for name in ("key", "value")] == [4, 4]


def test_one_head_of_keys_and_values_stays_one() -> None:
    for fronts, heads in ((((2, 4), (2, 1), (2, 1)), 1), (((2, 3, 4), (2, 3, 1), (2, 3, 1)), 3)):
        args = operands(*fronts)
        site = found(attention, args, expected=exact(*args))
        assert site["key"].meta["val"].shape[1] == heads


def test_values_of_more_batches_than_the_scores_are_refused() -> None:
    assert "other dims in front" in refused(attention, operands((4,), (4,), (2, 4)))


@pytest.mark.parametrize("shape", [(HEADS, QUERIES, KEYS), (QUERIES, KEYS)], ids=["each head", "all alike"])
def test_mask_of_a_video(shape: tuple[int, ...]) -> None:
    args = operands(*[(BATCH, FRAMES, HEADS)] * 3)
    hidden = numbers(*shape, seed=9) > 0.5
    hidden[..., 0] = False
    site = found(
        lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill(m, -math.inf), v),
        (*args, hidden),
        expected=exact(*args, hidden),
    )
    assert site["query"].meta["val"].shape[1] == (HEADS if len(shape) == 3 else FRAMES * HEADS)


@pytest.mark.parametrize("batch", [BATCH, FRAMES])
def test_mask_of_each_frame_is_refused(batch: int) -> None:
    args = operands(*[(batch, FRAMES, HEADS)] * 3)
    hidden = numbers(FRAMES, 1, 1, KEYS, seed=9) > 0.5
    hidden[..., 0] = False
    reason = refused(lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill(m, -math.inf), v), (*args, hidden))
    assert "middle one of three leading dims" in reason


@pytest.mark.parametrize("front", [(BATCH, FRAMES, HEADS), (BATCH * HEADS,)], ids=["video", "merged heads"])
def test_temperature_of_each_head_scales_the_query_before_its_dims_change(front: tuple[int, ...]) -> None:
    args = operands(*[front] * 3)
    factor = numbers(front[-1], 1, 1, seed=7)
    module = Module(lambda m, q, k, v: attend(q @ k.mT * SCALE * m.factor, v), factor=factor)
    found(module, args, expected=exact(args[0].double() * factor.double(), *args[1:]))


def test_temperature_of_merged_heads_under_a_mask_of_split_ones() -> None:
    args = operands(*[(BATCH * HEADS,)] * 3)
    hidden = torch.arange(KEYS) >= torch.tensor([3, 5])[:, None, None, None]

    def scores(m: Module, q: Tensor, k: Tensor) -> Tensor:
        both = (q @ k.mT * SCALE * m.factor).view(BATCH, HEADS, QUERIES, KEYS)
        return both.masked_fill(hidden, -math.inf).view(BATCH * HEADS, QUERIES, KEYS)

    factor = numbers(BATCH * HEADS, 1, 1, seed=7)
    module = Module(lambda m, q, k, v: attend(scores(m, q, k), v), factor=factor)
    flat = hidden.expand(BATCH, HEADS, 1, KEYS).flatten(0, 1)
    found(module, args, expected=exact(args[0].double() * factor.double(), *args[1:], flat))


def test_video_of_symbolic_batch_frames_and_length() -> None:
    args = operands(*[(BATCH, FRAMES, HEADS)] * 3)
    batch, frames, queries, keys = (torch.export.Dim(name, min=2, max=64) for name in ("b", "t", "n", "m"))
    spec = ({0: batch, 1: frames, 3: queries}, *[{0: batch, 1: frames, 3: keys}] * 2)
    program, _ = recognized(attention, args, (spec,))
    (site,) = sites(program)
    assert site["query"].meta["val"].shape[1] == HEADS
    longer = tuple(numbers(3, 7, HEADS, length, DIM, seed=s) for s, length in enumerate((4, 9, 9)))
    torch.testing.assert_close(run(program, longer).double(), exact(*longer), rtol=1e-5, atol=1e-5)


GROUPED = (BATCH, 2, 3), (BATCH, 2, 1), (BATCH, 2, 1)  # queries of three heads read one head of keys


@pytest.mark.parametrize("rows", [1, QUERIES], ids=["padding", "each query"])
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("added", [False, True], ids=["filled", "added"])
def test_mask_of_grouped_queries_has_a_dim_for_their_groups(batch: int, rows: int, added: bool) -> None:
    args = operands(*GROUPED)
    seen = numbers(batch, rows, KEYS, seed=9) > -0.5
    seen[..., 0] = True

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores, m = q @ k.mT * SCALE, m[:, None, None]
        if added:
            return attend(scores + torch.zeros(m.shape).masked_fill(~m, -math.inf), v)
        return attend(torch.where(m, scores, -math.inf), v)

    site = found(function, (*args, seen), expected=exact(*args, ~seen[:, None, None]))
    assert [tensor.meta["val"].dim() for tensor in site["mask_tensors"]] in ([2], [3], [4])
    assert site["bias"] is None and site["key"].meta["val"].shape[1] == 2


def test_bias_of_grouped_queries_stays_one() -> None:
    args = operands(*GROUPED)
    bias = numbers(BATCH, 1, 1, QUERIES, KEYS, seed=9)
    scores = args[0].double() @ args[1].double().mT * SCALE + bias
    site = found(
        lambda q, k, v, b: attend(q @ k.mT * SCALE + b, v),
        (*args, bias),
        expected=scores.softmax(-1) @ args[2].double(),
    )
    assert site["bias"].meta["val"].shape == (BATCH, 1, QUERIES, KEYS)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((1, 2, 1, 1, KEYS), "middle one of three leading dims"), ((1, 1, 3, 1, KEYS), "does not broadcast")],
    ids=["heads of keys", "groups"],
)
def test_mask_that_tells_heads_of_grouped_queries_apart_is_refused(shape: tuple[int, ...], reason: str) -> None:
    args = *operands(*GROUPED), numbers(*shape, seed=9) > 0.5
    assert reason in refused(lambda q, k, v, m: attend((q @ k.mT * SCALE).masked_fill(m, -math.inf), v), args)
