"""Planning and merging tokens: invariants of every plan, oracles in fp64, and hard inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.ir import ops
from regraft.ir.ops.matchings import DROPPING, MATCHINGS, PAIRED, SCORED
from regraft.ir.ops.plan_merge import most_removable
from tests.ir.graphs import numbers

Plan = tuple[Tensor, Tensor, Tensor]


def padding(lengths: list[int], tokens: int) -> Tensor:
    """True for the tokens of each sample that are no padding."""
    return torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]


def plan(metric: Tensor, matching: str, remove: int, keep: Tensor | None = None, **options: int) -> Plan:
    """A plan whose scores, where they are needed, are the first feature."""
    scores = metric[..., 0].contiguous() if matching in SCORED else None
    found: Plan = ops.plan_merge(metric, scores, keep, remove=remove, matching=matching, **options)
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Tensor, Tensor, int, int, int]:
    matching = draw(st.sampled_from(sorted(MATCHINGS)))
    tokens, prefix, suffix = draw(st.integers(2, 14)), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    remove = draw(st.integers(0, most_removable(tokens, matching, prefix, suffix)))
    metric = torch.randn(3, tokens, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        metric = metric.round()  # ties, rows of zeros
    if draw(st.booleans()):
        metric[0, draw(st.integers(0, tokens - 1))] = float("nan")
    keep = padding([draw(st.integers(0, tokens)) for _ in range(3)], tokens)
    return matching, metric, keep, remove, prefix, suffix


@settings(max_examples=150, derandomize=True, deadline=None)
@given(cases())
def test_every_plan_is_a_partition_of_the_tokens(case: tuple[str, Tensor, Tensor, int, int, int]) -> None:
    matching, metric, keep, remove, prefix, suffix = case
    kept, sources, slots = plan(metric, matching, remove, keep, prefix=prefix, suffix=suffix)
    tokens, left = metric.shape[1], metric.shape[1] - remove
    assert kept.shape == (3, left) and sources.shape == (3, remove)
    everything = torch.cat((kept, sources), dim=1).sort(-1).values
    assert torch.equal(everything, torch.arange(tokens).expand(3, tokens))
    assert (kept.diff() > 0).all() and (sources.diff() > 0).all()
    assert torch.equal(slots.gather(1, kept), torch.arange(left).expand(3, left))
    ends = [*range(prefix), *range(tokens - suffix, tokens)]
    assert all(token in row for row in kept.tolist() for token in ends)
    merged = slots.gather(1, sources)
    touched = torch.cat((sources[merged >= 0], kept.gather(1, merged.clamp(min=0))[merged >= 0]))
    samples = torch.arange(3)[:, None].expand(sources.shape)[merged >= 0].repeat(2)
    assert keep[samples, touched].all() and metric[samples, touched].isfinite().all()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(cases())
def test_the_plan_of_a_sample_is_its_own(case: tuple[str, Tensor, Tensor, int, int, int]) -> None:
    matching, metric, keep, remove, prefix, suffix = case
    together = plan(metric, matching, remove, keep, prefix=prefix, suffix=suffix)
    for row in range(3):
        alone = plan(metric[row : row + 1], matching, remove, keep[row : row + 1], prefix=prefix, suffix=suffix)
        assert all(torch.equal(part[row : row + 1], own) for part, own in zip(together, alone, strict=True))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(cases(), st.integers(0, 99))
def test_lengths_play_no_part_not_even_where_squares_leave_the_range(
    case: tuple[str, Tensor, Tensor, int, int, int], seed: int
) -> None:
    matching, metric, keep, remove, prefix, suffix = case
    generator = torch.Generator().manual_seed(seed)
    scaled = metric * 2.0 ** torch.randint(-100, 120, (*metric.shape[:2], 1), generator=generator)
    scores = torch.randn(metric.shape[:2], generator=generator)
    options = {"remove": remove, "matching": matching, "prefix": prefix, "suffix": suffix}
    plain, other = (ops.plan_merge(value, scores, keep, **options) for value in (metric, scaled))
    assert all(torch.equal(own, wanted) for own, wanted in zip(other, plain, strict=True))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("matching", sorted(MATCHINGS))
def test_no_matching_removes_all_tokens_between_the_ends(matching: str, prefix: int) -> None:
    x = numbers(2, 6, 4)
    most = most_removable(6, matching, prefix, 1)
    merged, _ = ops.merge_tokens(x, None, *plan(x, matching, most, prefix=prefix, suffix=1))
    assert merged.shape[1] > prefix + 1 and merged.isfinite().all()
    with pytest.raises(ValueError, match=f"can remove 0 to {most} beside"):
        plan(x, matching, 5 - prefix, prefix=prefix, suffix=1)
    assert most_removable(prefix + 1, matching, prefix, 1) == most_removable(1, matching, 1, 1) == 0


def test_the_most_similar_pair_is_merged_and_an_equal_one_by_index() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.9], [0.5, -1.0]]])
    _, sources, slots = plan(metric, "bipartite", 1)
    assert sources.tolist() == [[4]] and slots.tolist() == [[0, 1, 2, 3, 1, 4]]  # 1 and 3 are equally close to 4


def test_matching_twice_as_much_padding_changes_nothing_for_the_tokens_before_it() -> None:
    metric = numbers(1, 8, 4)
    longer = torch.cat((metric, numbers(1, 8, 4)), dim=1)
    _, sources, _ = plan(metric, "bipartite", 2)
    assert torch.equal(plan(longer, "bipartite", 2, padding([8], 16))[1], sources)


def test_padded_tokens_are_dropped_before_important_ones() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 0.0, 0.0]])
    found = ops.plan_merge(scores[..., None], scores, padding([3], 5), remove=3, matching="fuse")
    assert found[1].tolist() == [[1, 3, 4]] and found[2].tolist() == [[0, 1, 1, -1, -1]]


def test_a_causal_plan_merges_into_later_tokens_only() -> None:
    for seed in range(10):
        metric = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(seed))
        for matching in ("bipartite", "energy"):
            kept, sources, slots = ops.plan_merge(metric, remove=4, matching=matching, causal=True)
            into = slots.gather(1, sources)
            assert (kept.gather(1, into.clamp(min=0)) > sources)[into >= 0].all()


@pytest.mark.parametrize("matching", sorted(MATCHINGS))
def test_sizes_sum_to_the_tokens_and_means_are_exact(matching: str) -> None:
    x = numbers(2, 13, 5).double()
    sizes = torch.ones(2, 13)
    current, remembered = x, torch.arange(13).expand(2, 13)
    for remove in (3, 2):
        kept, sources, slots = plan(current, matching, remove, prefix=1)
        current, sizes = ops.merge_tokens(current, sizes, kept, sources, slots)
        remembered = torch.where(remembered < 0, -1, slots.gather(1, remembered.clamp(min=0)))
    selection = torch.nn.functional.one_hot(remembered.clamp(min=0), 8).double() * (remembered >= 0)[..., None]
    assert torch.equal(sizes.double(), selection.sum(1))
    if matching not in DROPPING:
        assert sizes.sum(1).tolist() == [13, 13]
    expected = (selection.transpose(1, 2) @ x) / selection.sum(1)[..., None]
    if matching not in DROPPING:
        torch.testing.assert_close(current, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ops.unmerge_tokens(current, remembered)[:, 0], x[:, 0])


def test_unmerging_gives_untouched_tokens_their_bits_back() -> None:
    x = numbers(2, 11, 7)
    found = plan(x, "bipartite", 4)
    merged, sizes = ops.merge_tokens(x, torch.full((2, 11), 3.0), *found)
    back = ops.unmerge_tokens(merged, found[2])
    alone = sizes.gather(1, found[2]) == 3
    assert alone.any() and torch.equal(back[alone], x[alone])


def test_equal_tokens_merge_without_a_change() -> None:
    x = numbers(1, 4, 6).repeat_interleave(2, dim=1)
    kept, sources, slots = plan(x, "bipartite", 4)
    merged, sizes = ops.merge_tokens(x, None, kept, sources, slots)
    assert torch.equal(ops.unmerge_tokens(merged, slots), x) and (sizes == 2).all()


def test_what_is_not_finite_stays_where_it_is() -> None:
    x = numbers(2, 10, 4)
    x[0, 3] = float("nan")
    for matching in sorted(PAIRED):
        found = plan(x, matching, 3)
        merged, _ = ops.merge_tokens(x, None, *found)
        assert merged.isnan().any(-1).sum() == 1 and not merged[1].isnan().any()
    x[0] = float("inf")
    assert all((part < 10).all() for part in plan(x, "bipartite", 5))


def test_scores_are_the_weights_of_attention() -> None:
    query, key = numbers(2, 4, 5, 8), numbers(2, 2, 5, 8)
    keep = padding([5, 3], 5)
    logits = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3).double()
    weights = logits.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
    first = ops.token_scores(query, key, keep, scale=0.3, kind="cls")
    torch.testing.assert_close(first.double(), weights[:, :, 0].mean(1), rtol=1e-5, atol=1e-6)
    received = ops.token_scores(query, key, keep, scale=0.3, kind="received").double()
    expected = torch.stack([weights[0].mean((0, 1)), weights[1, :, :3].mean((0, 1))])
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-6)


def test_the_last_row_is_that_of_the_last_token_that_is_there() -> None:
    query, key = numbers(2, 2, 5, 4).double(), numbers(2, 2, 5, 4).double().flip(-1)
    keep = padding([5, 3], 5)
    weights = (query @ key.mT * 0.4).masked_fill(~keep[:, None, None], -torch.inf).softmax(-1).mean(1)
    expected = torch.stack((weights[0, 4], weights[1, 2]))
    found = ops.token_scores(query, key, keep, scale=0.4, kind="last")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_flow_is_relation_and_meaning_times_strength() -> None:
    query, key, value = (numbers(2, 2, 6, 4, seed=seed).double() for seed in range(3))
    relation = (query[:, :, :1] @ key[:, :, 1:].mT * 0.4).softmax(-1).mean((1, 2))
    meaning = (value[:, :, :1] @ value[:, :, 1:].mT).softmax(-1).mean((1, 2))
    strength = value.mean(1).abs().sum(-1)[:, 1:]
    found = ops.token_scores(query, key, None, value, scale=0.4, kind="flow")
    torch.testing.assert_close(found[:, 1:].double(), (relation + meaning) * strength, rtol=1e-5, atol=1e-6)
    assert (found[:, 0] == 0).all()


def test_the_norm_is_that_of_the_whole_key() -> None:
    key = numbers(2, 3, 5, 4)
    found = ops.token_scores(key, key, scale=1.0, kind="norm")
    torch.testing.assert_close(found, key.transpose(1, 2).flatten(2).norm(dim=-1))


def test_received_attention_of_many_tokens_is_added_up_in_parts() -> None:
    query, key = numbers(1, 2, 300, 4), numbers(1, 2, 300, 4, seed=1)
    expected = (query @ key.mT * 0.5).softmax(-1).mean((1, 2))
    torch.testing.assert_close(ops.token_scores(query, key, scale=0.5, kind="received"), expected)


def test_diverse_keeps_what_greedy_max_min_takes() -> None:
    metric = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    unit = (metric / metric.norm(dim=-1, keepdim=True))[0].double()
    distance = 1 - unit @ unit.T
    taken = [0]  # the protected one
    while len(taken) < 5:
        left = [token for token in range(12) if token not in taken]
        taken.append(max(left, key=lambda token: float(distance[token, taken].min())))
    kept, _, slots = ops.plan_merge(metric, remove=7, matching="diverse", prefix=1)
    assert kept[0].tolist() == sorted(taken) and (slots == -1).sum() == 7


def test_distinct_drops_what_is_most_alike_a_pivot() -> None:
    metric = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(0))
    scores = metric.norm(dim=-1)
    pivots = scores[0].topk(8).indices
    unit = (metric / scores[..., None])[0]
    alike = (unit @ unit[pivots].T).amax(-1)
    alike[pivots] = -2
    _, sources, _ = ops.plan_merge(metric, scores, remove=10, matching="distinct")
    assert sources[0].tolist() == sorted(alike.topk(10).indices.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": 5}, "5 of 9 tokens were to be removed; the matching 'bipartite' can remove 0 to 4"),
        ({"remove": 1, "matching": "best"}, "unknown matching 'best'"),
        ({"remove": 1, "matching": "drop"}, "needs scores"),
        ({"remove": 1, "matching": "grid", "causal": True}, "cannot keep a causal order"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.plan_merge(numbers(1, 9, 2), **options)
