"""Heads that see less or are dropped: the program equals the model with the same change made by its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.nodes import arguments, shape
from regraft.passes.attention.drop_heads import DropHeads
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attentions
from regraft.passes.attention.offers import offer_dormant_heads, offer_windows
from regraft.passes.attention.profile import HeadProfile, profile_heads
from regraft.passes.attention.restrict import RestrictHeads
from regraft.passes.attention.specialise import SpecialiseHeads, kinds_of, whole_groups
from regraft.passes.budget.candidate import Candidate
from tests.passes.attention.models import SIZE, Model, X, after, masks, output, recognised

aten = torch.ops.aten


def close(value: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def near(scores: Tensor, window: int, sinks: int) -> Tensor:
    """Which keys a restricted head sees."""
    row, key = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
    return ((row - key).abs() < window) | (key < sinks)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [None, (1, 3)])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_restricted_head_sees_sinks_and_a_window(causal: bool, heads: tuple[int, ...] | None, sinks: int) -> None:
    model = Model(causal=causal)
    program = recognised(model)
    session = after(program, RestrictHeads(1, 5, sinks, heads))

    def change(layer: int, place: str, value: Tensor) -> Tensor:
        if (layer, place) != (1, "scores"):
            return value
        chosen = torch.tensor([heads is None or head in heads for head in range(4)])[:, None, None]
        return value.masked_fill(chosen & ~near(value, 5, sinks), -math.inf)

    close(output(program), model(X, change))
    assert [item.exactness for item in session.log.applications] == ["lossy"]


def test_streaming_is_one_interval_and_sinks() -> None:
    program = recognised(Model())
    after(program, *(RestrictHeads(place, 5, 2) for place in range(3)))
    assert masks(program) == ["band(None,0) & (band(-4,None) | prefix(2))"] * 3


def test_a_window_that_hides_nothing_changes_nothing() -> None:
    program = recognised(Model(causal=False))
    before = output(program)
    session = after(program, RestrictHeads(0, 40))
    assert torch.equal(output(program), before)
    assert not session.log.applications or masks(program)[0] != "all"


def test_more_keys_than_queries_are_counted_from_the_end() -> None:
    class Step(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return (query @ key.mT).softmax(-1) @ value

    query, key, value = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 20, 8), torch.randn(2, 4, 20, 8)
    program = recognised(Step(), query, key, value)
    after(program, RestrictHeads(0, 5, 2))
    distance = torch.arange(20) - (torch.arange(2)[:, None] + 18)
    seen = (distance.abs() < 5) | (torch.arange(20) < 2)
    close(output(program), (query @ key.mT).masked_fill(~seen, -math.inf).softmax(-1) @ value)


@pytest.mark.parametrize("pass_", [lambda: RestrictHeads(0, 0), lambda: SpecialiseHeads(4, coverage=0.0)])
def test_a_knob_that_makes_no_sense_is_told(pass_: object) -> None:
    with pytest.raises(AttentionError, match="give"):
        pass_()  # type: ignore[operator]


def test_a_place_or_a_head_that_is_not_there_is_told() -> None:
    program = recognised(Model())
    with pytest.raises(AttentionError, match="the program has 3"):
        after(program, RestrictHeads(3, 5))
    with pytest.raises(AttentionError, match="has 4"):
        after(program, RestrictHeads(0, 5, heads=(4,)))
    with pytest.raises(AttentionError, match="one at least must stay"):
        after(program, DropHeads(0, (0, 1, 2, 3)))


@pytest.mark.parametrize(("kv_heads", "gone"), [(4, (0, 2)), (4, (3,)), (2, (2, 3)), (1, ())])
def test_dropped_heads_give_nothing_and_their_projections_shrink(kv_heads: int, gone: tuple[int, ...]) -> None:
    model = Model(kv_heads=kv_heads)
    program = recognised(model)
    after(program, DropHeads(1, gone))

    def change(layer: int, place: str, value: Tensor) -> Tensor:
        kept = torch.tensor([head not in gone for head in range(4)], dtype=value.dtype)[:, None, None]
        return value * kept if (layer, place) == (1, "heads") else value

    close(output(program), model(X, change))
    site = arguments(attentions(program)[1])
    left = 4 - len(gone)
    assert shape(site["query"])[1] == left and shape(site["key"])[1] == left * kv_heads // 4
    widths = [shape(arguments(n)["weight"]) for n in program.graph.nodes if n.target is aten.linear.default]
    assert widths.count((left * SIZE, 32)) >= (1 if gone else 0)
    assert ((32, left * SIZE) in widths) or not gone


def test_part_of_a_group_is_not_dropped() -> None:
    with pytest.raises(AttentionError, match="whole groups"):
        after(recognised(Model(kv_heads=2)), DropHeads(0, (1,)))
    assert whole_groups([1, 2, 3], 2) == (2, 3)


def test_where_the_projections_are_not_seen_heads_are_computed_and_not_read() -> None:
    class Bare(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return (query @ key.mT).softmax(-1) @ value

    operands = [torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    program = recognised(Bare(), *operands)
    wanted = output(program)
    after(program, DropHeads(0, (1,)))
    kept = torch.tensor([1.0, 0, 1, 1])[:, None, None]
    close(output(program), wanted * kept)
    assert shape(attentions(program)[0])[1] == 3


def test_a_profile_says_how_much_heads_give_and_where_they_look() -> None:
    model = Model(layers=1)
    with torch.no_grad():  # head 0 gives nothing; head 1 looks at its own key alone, head 2 at the first
        model.blocks[0].value.weight[:SIZE] = 0
        model.blocks[0].value.bias[:SIZE] = 0
    program = recognised(model)
    (profile,) = profile_heads(program, 4, 2)
    assert profile.norm[0] < 1e-6 and abs(sum(profile.norm) / 4 - 1) < 1e-6
    site = arguments(attentions(program)[0])
    assert site["mask"] == "band(None,0)"
    assert all(0 < share <= 1 for share in profile.near)
    assert all(near + sunk <= 1 + 1e-6 for near, sunk in zip(profile.near, profile.sunk, strict=True))
    (whole,) = profile_heads(program, 40, 0)
    assert whole.near == pytest.approx((1.0,) * 4)


def test_heads_are_named_by_what_they_do() -> None:
    profile = HeadProfile((0.01, 1.0, 1.0, 1.0), (0.5, 0.97, 0.5, 0.5), (0.1, 0.0, 0.46, 0.2))
    assert kinds_of(profile, 0.95, 0.1) == ["dormant", "local", "streaming", "global"]
    assert kinds_of(profile, 1.0, 0.0) == ["global"] * 4


def test_specialised_heads_are_dropped_and_masked() -> None:
    model = Model(layers=2)
    with torch.no_grad():
        for block in model.blocks:
            block.value.weight[:SIZE] *= 1e-3
            block.value.bias[:SIZE] *= 1e-3
    program = recognised(model)
    session = after(program, SpecialiseHeads(8, 2, coverage=0.5, dormant=0.1))
    assert {shape(site)[1] for site in attentions(program)} == {3}
    assert any("band(-7" in mask for mask in masks(program))
    assert {item.rule for item in session.log.applications} == {"drop-heads", "restrict-heads"}
    full = recognised(model)
    assert after(full, SpecialiseHeads(8, 2, coverage=1.0)).log.applications == []


def test_candidates_leave_the_program_alone_and_their_rewrites_do_what_they_say() -> None:
    model = Model(layers=1)
    with torch.no_grad():
        model.blocks[0].value.weight[:SIZE] *= 1e-3
        model.blocks[0].value.bias[:SIZE] *= 1e-3
    long = torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(2))
    program = recognised(model, long)
    before = output(program)
    windows, dormant = (
        [item for item in offer(program, "cpu") if isinstance(item, Candidate)]
        for offer in (offer_windows, offer_dormant_heads)
    )
    assert [candidate.knob for candidate in windows] == ["4 sinks, a window of 128", "4 sinks, a window of 64"]
    assert dormant[0].knob == "1 of 4 heads dropped" and dormant[0].site == windows[0].site
    assert torch.equal(output(program), before)
    after(program, dormant[0].rewrite)
    assert [node.target for node in program.graph.nodes].count(ops.attention) == 1
    torch.testing.assert_close(output(program), before, rtol=0.05, atol=0.05)
