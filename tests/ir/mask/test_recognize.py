"""Masks built by torch code: exported with static and symbolic lengths, recognised, compared with running the
code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.ir.mask import (
    Alibi,
    Interpreter,
    Refusal,
    TensorBias,
    is_causal,
    recognize_condition,
    recognize_mask,
)
from tests.ir.mask.support import export, recognize

LENGTH = 11
MIN = torch.finfo(torch.float32).min
IDS = torch.randint(0, 3, (2, LENGTH), generator=torch.Generator().manual_seed(3))
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def q(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])[:, None]


def k(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])[None, :]


def causal(ids: Tensor) -> Tensor:
    return k(ids) <= q(ids)


def square(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1])


def one_changed(ids: Tensor) -> Tensor:
    return torch.where((q(ids) == 0) & (k(ids) == 1), True, causal(ids))


def written(ids: Tensor) -> Tensor:
    mask = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    mask[0, 1] = True
    return mask


def sdpa_reference(ids: Tensor) -> Tensor:
    bias = torch.zeros(ids.shape[1], ids.shape[1])
    bias.masked_fill_(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(0).logical_not(), -math.inf)
    return bias


def padded(ids: Tensor) -> Tensor:
    return (ids != 0)[:, None, None, :]


def documents(ids: Tensor) -> Tensor:
    return (ids[:, None, :, None] == ids[:, None, None, :]) & causal(ids)


BOOLEAN: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("band(None,0)", causal),
    ("band(None,0)", lambda i: square(i).tril() == 1),
    ("band(None,0)", lambda i: ~square(i).triu(1).bool()),
    ("band(None,0)", lambda i: ~(square(i) - square(i).tril()).bool()),
    ("band(None,0)", lambda i: (q(i) - k(i)) >= 0),
    ("band(None,0)", lambda i: (k(i) - q(i)).clamp(min=0) == 0),
    ("band(None,0)", lambda i: torch.cumsum(torch.ones_like(i), 1)[:1, None, :] <= q(i) + 1),
    ("band(None,0)", lambda i: ~(k(i) > q(i))),
    ("band(None,0)", lambda i: (2 * k(i)) < (2 * q(i) + 1)),
    ("band(None,1)", lambda i: k(i) <= q(i) + 1),
    ("band(None,-1)", lambda i: k(i) < q(i)),
    ("band(0,None)", lambda i: square(i).triu().bool()),
    ("band(-3,0)", lambda i: causal(i) & (k(i) > q(i) - 4)),
    ("band(-3,3)", lambda i: (q(i) - k(i)).abs() <= 3),
    ("band(4,None) | band(None,-4)", lambda i: (q(i) - k(i)).abs() > 3),
    ("band(None,0) | prefix(4)", lambda i: causal(i) | (k(i) < 4)),
    ("chunk(4)", lambda i: q(i) // 4 == k(i) // 4),
    ("band(None,0) & chunk(4)", lambda i: causal(i) & (q(i) // 4 == k(i) // 4)),
    ("band(None,0) | chunk(4)", lambda i: k(i) // 4 <= q(i) // 4),
    ("keys(0)", padded),
    ("band(None,0) & keys(0)", lambda i: causal(i) & padded(i)),
    ("band(None,0) & keys(0)", lambda i: ~(~causal(i) | (i == 0)[:, None, None, :])),
    ("band(None,0) & same(0,0)", documents),
    ("all", lambda i: (q(i) >= 0) & (k(i) > -1)),
    ("none", lambda i: (k(i) < 0) | (q(i) < 0)),
    (
        "band(None,0) & keys(0)",
        lambda i: causal(i) & i.bool()[torch.arange(2)[:, None, None, None], k(i)[None, None]],
    ),
    ("band(None,0)", lambda i: torch.cat([causal(i), causal(i)], 1)[:, : i.shape[1]]),
    ("rows(0)", lambda i: (i != 0)[:, None, :, None].expand(-1, 1, -1, i.shape[1])),
    ("lengths(0)", lambda i: (k(i) < i.sum(1)[:, None])[:, None, None].expand(-1, 1, i.shape[1], -1)),
    ("keys(0)", lambda i: (torch.nn.functional.pad(i, (1, 0), value=1)[:, :-1] > 0)[:, None, None]),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("number", range(len(BOOLEAN)))
def test_boolean(number: int, dynamic: bool) -> None:
    text, build = BOOLEAN[number]
    form, got, want = recognize(build, (IDS,), dynamic)
    assert sorted(str(form.predicate)) == sorted(text) and form.fill is None and form.bias is None
    assert torch.equal(got, want.expand(got.shape))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("build", [one_changed, written, lambda i: causal(i) ^ padded(i),
                                   lambda i: i[:, None, None, :] <= i[:, None, :, None]])  # fmt: skip
def test_irregular_masks_keep_their_meaning(build: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    form, got, want = recognize(build, (IDS,), dynamic)
    assert not is_causal(form.predicate)
    assert torch.equal(got, want.expand(got.shape))


ADDITIVE: list[tuple[str, float | None, Callable[[Tensor], Tensor]]] = [
    ("band(None,0)", -math.inf, lambda i: torch.where(causal(i), 0.0, -math.inf)),
    ("band(None,0)", MIN, lambda i: torch.where(k(i) > q(i), MIN, 0.0)),
    (
        "band(None,0)",
        -math.inf,
        lambda i: torch.zeros(i.shape[1], i.shape[1]).masked_fill(~causal(i), -math.inf),
    ),
    ("band(None,0)", -math.inf, lambda i: torch.full((i.shape[1], i.shape[1]), -math.inf).triu(1)),
    ("band(None,0)", -math.inf, sdpa_reference),
    ("band(None,0)", -math.inf, lambda i: causal(i).float().log()),
    ("keys(0)", MIN, lambda i: (1.0 - padded(i).float().expand(-1, -1, i.shape[1], -1)) * MIN),
    ("keys(0)", -1e9, lambda i: (1.0 - padded(i).float()) * -1e9),
    ("keys(0)", -1e4, lambda i: (~padded(i)) * -1e4),
    (
        "band(None,0) & keys(0)",
        -math.inf,
        lambda i: torch.where(causal(i), 0.0, -math.inf) + torch.where(padded(i), 0.0, -math.inf),
    ),
    ("band(None,0) & keys(0)", MIN, lambda i: torch.where(causal(i), 0.0, MIN).masked_fill(~padded(i), MIN)),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("number", range(len(ADDITIVE)))
def test_additive(number: int, dynamic: bool) -> None:
    text, fill, build = ADDITIVE[number]

    def full(ids: Tensor) -> Tensor:
        return build(ids).expand(ids.shape[0], 1, ids.shape[1], ids.shape[1])

    form, got, want = recognize(full, (IDS,), dynamic)
    assert str(form.predicate) == text and form.fill == fill and form.bias is None
    assert torch.equal(got, want)


@pytest.mark.parametrize("fills", [(MIN, MIN), (-1e9, -math.inf), (-1e4, -1e9)])
def test_sums_of_finite_masks_stay_tensors(fills: tuple[float, float]) -> None:
    form, got, want = recognize(
        lambda i: torch.where(causal(i), 0.0, fills[0]) + torch.where(padded(i), 0.0, fills[1]), (IDS,)
    )
    assert isinstance(form.bias, TensorBias) and form.fill is None
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).min
    form, got, want = recognize(lambda i: (1.0 - causal(i).to(dtype)) * low, (IDS,), True)
    assert is_causal(form.predicate) and form.fill == low and torch.equal(got, want)
    # Positions beyond 256 collide in bfloat16: the comparison is not causal there.
    wide = torch.zeros(1, 400, dtype=torch.int64)
    form, got, want = recognize(lambda i: k(i).to(torch.bfloat16) <= q(i).to(torch.bfloat16), (wide,))
    assert not is_causal(form.predicate) and torch.equal(got, want)


ALIBI: list[tuple[str, float, Callable[[Tensor, Tensor], Tensor]]] = [
    ("relative", 1.0, lambda i, s: s[:, None, None] * (k(i) - q(i))),
    ("relative", -1.0, lambda i, s: s[:, None, None] * (q(i) - k(i))),
    ("key", 1.0, lambda i, s: s[None, :, None, None] * k(i)),
    ("key", 1.0, lambda i, s: torch.arange(1 - i.shape[1], 1)[None, None, :] * s[:, None, None]),
    ("distance", -1.0, lambda i, s: -s[:, None, None] * (q(i) - k(i)).abs()),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", range(len(ALIBI)))
def test_alibi(number: int, masked: bool, dynamic: bool) -> None:
    position, scale, build = ALIBI[number]

    def whole(i: Tensor, s: Tensor) -> Tensor:
        bias = build(i, s).expand(1, 4, i.shape[1], i.shape[1])
        return bias + torch.where(causal(i), 0.0, -math.inf) if masked else bias

    form, got, want = recognize(whole, (IDS, SLOPES), dynamic)
    assert isinstance(form.bias, Alibi) and (form.bias.position, form.bias.scale) == (position, scale)
    assert is_causal(form.predicate) if masked else form.fill is None
    torch.testing.assert_close(got, want)


def test_bias_and_mask() -> None:
    bias = torch.randn(2, 1, LENGTH, LENGTH)
    form, got, want = recognize(lambda i, b: b + torch.where(causal(i), 0.0, MIN), (IDS, bias))
    assert isinstance(form.bias, TensorBias) and form.fill == MIN and form.combine == "add"
    assert torch.equal(got, want)
    form, got, want = recognize(lambda i, b: b.masked_fill(~causal(i), MIN), (IDS, bias))
    assert form.fill == MIN and form.combine == "replace" and is_causal(form.predicate)
    assert torch.equal(got, want)


def test_condition() -> None:
    _, node = export(lambda i: k(i) > q(i), (IDS,), False)
    form = recognize_condition(node, -1e4, LENGTH, LENGTH, torch.float32, masked_where_true=True)
    assert not isinstance(form, Refusal) and is_causal(form.predicate) and form.fill == -1e4


def test_a_write_after_the_use_is_not_seen() -> None:
    def build(i: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(i.shape[1], i.shape[1]).masked_fill_(~causal(i), -math.inf)
        used = mask * 2.5
        mask[0] = 0.0
        return used, mask

    class Twice(torch.nn.Module):
        def forward(self, i: Tensor) -> tuple[Tensor, Tensor]:
            return build(i)

    graph = torch.export.export(Twice(), (IDS,), strict=False).graph
    used = next(node for node in graph.nodes if "mul" in str(node.target))
    mask = used.args[0]
    before = recognize_mask(mask, LENGTH, LENGTH, reader=used)
    assert not isinstance(before, Refusal) and is_causal(before.predicate) and before.bias is None
    after = recognize_mask(mask, LENGTH, LENGTH)
    assert not isinstance(after, Refusal) and isinstance(after.bias, TensorBias)


def test_constant_buffers() -> None:
    class Sliced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("causal", torch.ones(64, 64).tril().bool()[None, None])

        def forward(self, i: Tensor) -> Tensor:
            return self.causal[:, :, : i.shape[1], : i.shape[1]]

    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(Sliced(), (IDS,), dynamic_shapes=({1: length},), strict=False)
    graph = program.graph
    node = next(iter(reversed(graph.nodes))).args[0][-1]
    buffer = next(iter(graph.nodes))
    extent = node.meta["val"].shape[-1]
    plain = recognize_mask(node, extent, extent)
    assert not isinstance(plain, Refusal) and str(plain.predicate) == "dense(0)"
    known = recognize_mask(node, extent, extent, Interpreter(graph, {buffer: program.state_dict["causal"]}))
    assert not isinstance(known, Refusal) and is_causal(known.predicate)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_numbers_that_are_asked_for_zero_are_kept_as_the_answers(dynamic: bool) -> None:
    """A dilated mask: the remainders take eight times the memory of what is asked of them."""

    def dilated(ids: Tensor) -> Tensor:
        return ((q(ids) - k(ids)) % 3 == 0) & causal(ids)

    form, got, want = recognize(dilated, (IDS,), dynamic)
    assert [node.meta["val"].dtype for node in form.tensors] == [torch.bool]
    assert str(form.predicate) == "band(None,0) & dense(0)"
    assert torch.equal(got, want)


def test_refusals_say_why() -> None:
    _, node = export(causal, (IDS,), False)
    assert isinstance(recognize_mask(node, 3, 3), Refusal)
    _, node = export(lambda i: k(i) - q(i), (IDS,), False)
    refused = recognize_mask(node, LENGTH, LENGTH)
    assert isinstance(refused, Refusal) and "int64" in refused.reason


def test_long_chains_and_the_graph_is_only_read() -> None:
    def build(i: Tensor) -> Tensor:
        mask = causal(i)
        for _ in range(2000):
            mask = mask.clone() & mask
        return mask

    graph, node = export(build, (IDS,), False)
    before = str(graph)
    form = recognize_mask(node, LENGTH, LENGTH)
    assert not isinstance(form, Refusal) and is_causal(form.predicate) and str(graph) == before


TERMS: list[Callable[[Tensor, int], Tensor]] = [
    lambda i, c: k(i) <= q(i) + c,
    lambda i, c: k(i) >= q(i) - c,
    lambda i, c: (k(i) - q(i)).abs() < c,
    lambda i, c: k(i) < c,
    lambda i, c: q(i) // (abs(c) + 1) == k(i) // (abs(c) + 1),
    lambda i, c: torch.maximum(k(i), q(i)) <= c + k(i),
    lambda i, c: torch.where(k(i) < c, k(i), q(i)) == k(i),
    lambda i, c: q(i) + k(i) < c,
    lambda i, c: i[:, None, :] == c,
    lambda i, c: i[:, :, None] == i[:, None, :],
    lambda i, c: ~((i > c)[:, :, None]),
]
builders = st.recursive(
    st.builds(lambda f, c: lambda i: f(i, c), st.sampled_from(TERMS), st.integers(-3, 6)),
    lambda inner: st.one_of(
        st.builds(lambda a, b: lambda i: a(i) & b(i), inner, inner),
        st.builds(lambda a, b: lambda i: a(i) | b(i), inner, inner),
        st.builds(lambda a, b: lambda i: torch.logical_xor(a(i), b(i)), inner, inner),
        st.builds(lambda a: lambda i: ~a(i), inner),
        st.builds(lambda a, b: lambda i: torch.where(b(i), a(i), ~b(i)), inner, inner),
        st.builds(lambda a: lambda i: a(i).long() * 2 - 1 > 0, inner),
    ),
    max_leaves=4,
)


def test_a_tensor_that_repeats_itself_over_batches_is_no_tensor_of_heads() -> None:
    """What is chosen by a tensor of batches, and is the same either way, lies in memory once a batch."""

    def full(i: Tensor) -> Tensor:
        seen = torch.logical_xor(q(i) + k(i) < 3, torch.where(i[:, :, None] > 0, q(i) * k(i) > 7, q(i) * k(i) > 7))
        return seen.expand(2, i.shape[1], i.shape[1])[:, None]

    for dynamic in (False, True):
        _, got, want = recognize(full, (IDS,), dynamic)
        assert torch.equal(got, want)


@given(builders, st.booleans(), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_random_masks(build: Callable[[Tensor], Tensor], dynamic: bool, seed: int) -> None:
    ids = torch.randint(-2, 4, (2, LENGTH), generator=torch.Generator().manual_seed(seed))

    def full(i: Tensor) -> Tensor:
        return build(i).expand(2, i.shape[1], i.shape[1])[:, None]

    _, got, want = recognize(full, (ids,), dynamic)
    assert torch.equal(got, want)
