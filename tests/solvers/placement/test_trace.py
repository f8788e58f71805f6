"""Traces, their statistics, and that pieces sum to the whole whatever their order and process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.statistics import Limits, Statistics, aggregate, observe
from regraft.solvers.placement.trace import Batch, Trace
from regraft.solvers.placement.workload import workload_of
from tests.solvers.placement.cases import random_trace


def test_statistics_are_what_counting_one_by_one_gives() -> None:
    trace = random_trace(batches=2)
    found = observe(trace).routing["all", "mixed"]
    counts, together = np.zeros((3, 8)), np.zeros((3, 8, 8))
    moves = np.zeros((2, 8, 8))
    for batch in trace.batches:
        assert batch.experts is not None
        for token in batch.experts.transpose(1, 0, 2):
            for layer, chosen in enumerate(token):
                counts[layer, chosen] += 1
                together[layer, chosen[0], chosen[1]] += 1
                together[layer, chosen[1], chosen[0]] += 1
                if layer < 2:
                    moves[layer][np.ix_(chosen, token[layer + 1])] += 1
    assert (found.counts == counts).all() and found.tokens == 80
    assert (found.coactivation == together).all()
    assert found.transitions is not None
    assert (found.transitions == moves).all()
    assert (found.transitions.sum(2) == 2 * counts[:-1]).all()  # each choice is paired with two


def same(first: Statistics, second: Statistics) -> bool:
    mine, theirs = first.routing["all", "mixed"], second.routing["all", "mixed"]
    assert mine.sample is not None and theirs.sample is not None
    return bool(
        (mine.counts == theirs.counts).all()
        and (mine.kept.rows == theirs.kept.rows).all()
        and (mine.sample.rows == theirs.sample.rows).all()
        and mine.batches == theirs.batches
    )


@given(size=st.integers(1, 5), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_pieces_sum_to_the_whole(size: int, seed: int) -> None:
    trace, limits = random_trace(seed, batches=5), Limits(batches=3, tokens=50)
    whole = observe(trace, limits)
    pieces = [observe(piece, limits, number * size) for number, piece in enumerate(trace.chunks(size))]
    merged = pieces[-1]
    for piece in pieces[:-1]:  # any order
        merged = merged.merge(piece)
    assert same(whole, merged)


def test_pieces_are_counted_in_parallel_and_read_where_they_are_counted() -> None:
    trace = random_trace(batches=6)
    pieces = [partial(replace, piece) for piece in trace.chunks(2)]
    with ThreadPoolExecutor(2) as executor:
        parallel = aggregate(pieces, executor=executor, batches_per_piece=2)
    assert same(parallel, observe(trace))
    with pytest.raises(PlacementError, match="no piece"):
        aggregate([])


def test_pieces_of_different_models_are_refused() -> None:
    with pytest.raises(PlacementError, match="different models"):
        aggregate([random_trace(experts=8), random_trace(experts=16)])


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (np.full((2, 4), np.nan), "not numbers"),
        (np.full((2, 4), -1), "negative count in layer 3"),
        (np.zeros((3, 4), dtype=np.int64), r"expected \(2, 4\)"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: np.ndarray, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlacementError, match=said):
        Trace(4, 2, (3, 4), (Batch(counts),))


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlacementError, match="expert 9"):
        Batch.of_tokens(np.full((1, 2, 2), 9), 8)
    with pytest.raises(PlacementError, match="one expert twice"):
        Batch.of_tokens(np.zeros((1, 2, 2), dtype=np.int32), 8)
    with pytest.raises(PlacementError, match="without batches"):
        Trace(4, 2, (0,), ())


def test_each_scenario_is_split_and_selected_alike() -> None:
    trace = random_trace(batches=4)
    named = replace(trace, batches=tuple(replace(b, scenario="ab"[n % 2]) for n, b in enumerate(trace.batches)))
    plan, score = named.split(0.5)
    assert [b.scenario for b in plan.batches] == ["a", "b"] == [b.scenario for b in score.batches]
    assert named.select(["b"]).scenarios == ("b",)
    with pytest.raises(PlacementError, match="ask for one of these"):
        named.select(["c"])
    assert {s.name for s in workload_of(named).scenarios} == {"a", "b"}


def test_an_empty_layer_is_named() -> None:
    batch = Batch(np.array([[1, 2, 3, 4], [0, 0, 0, 0]]))
    with pytest.raises(PlacementError, match="no tokens in layer 7"):
        workload_of(Trace(4, 2, (3, 7), (batch,)))


def test_batches_are_scaled_to_what_will_be_served() -> None:
    workload = workload_of(random_trace(), tokens_per_batch=1000)
    np.testing.assert_allclose(workload.scenarios[0].counts.sum(2), 2000)
