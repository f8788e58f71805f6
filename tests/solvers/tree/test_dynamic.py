"""Dynamic sparse trees: no choice of trees is better, by brute force, and the latencies that were measured decide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.solvers.tree.dynamic import dynamic_trees, fastest_trees, long_run
from regraft.solvers.tree.errors import TreeError
from regraft.solvers.tree.model import Floats, Node, Tree

MEDUSA = np.array([[0.6, 0.15, 0.06, 0.03], [0.4, 0.12, 0.05, 0.02], [0.3, 0.1, 0.04, 0.02]])


def every_tree(state: int, ranks: int, inputs: int, states: int) -> Iterator[Tree]:
    """All trees of a state with at most ``inputs`` tokens, any ranks, any prompts."""
    paths = [path for depth in range(state + 1) for path in itertools.product(range(ranks), repeat=depth)]
    for count in range(1, inputs + 1):
        for chosen in itertools.combinations(paths, count):
            if () not in chosen or any(path and path[:-1] not in chosen for path in chosen):
                continue
            for prompts in itertools.product(range(states), repeat=count):
                if count + sum(prompts) <= inputs:
                    yield Tree(
                        tuple(
                            Node(chosen.index(p[:-1]) if p else -1, len(p), p[-1] if p else 0, n)
                            for p, n in zip(chosen, prompts, strict=True)
                        )
                    )


def best_by_force(rates: Floats, inputs: int) -> float:
    states = len(rates) + 1
    options = [list(every_tree(state, rates.shape[1], inputs, states)) for state in range(states)]
    return max(long_run(rates, trees) for trees in itertools.product(*options))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.05, 0.9), min_size=2, max_size=2), st.floats(0.0, 1.0), st.integers(1, 4))
def test_no_trees_give_more_by_brute_force(firsts: list[float], spread: float, inputs: int) -> None:
    rates = np.array([[first, min(first, 1 - first) * spread] for first in firsts])[: 1 if inputs == 4 else 2]
    found = dynamic_trees(rates, inputs)
    best = best_by_force(rates, inputs)
    assert found.tokens == pytest.approx(best, abs=1e-6)
    assert found.bound >= best - 1e-6 and found.bound - found.tokens <= 1e-6
    assert all(tree.inputs <= inputs for tree in found.trees)


def test_one_state_with_drafts_is_the_highest_chances() -> None:
    """Where every node could be prompted for free the candidates alone would count: the tree of the deepest state holds
    nodes of the highest chances among those that it could hold."""
    found = dynamic_trees(MEDUSA, 20)
    tree = found.trees[-1]
    reached, last = tree.chances(MEDUSA)
    assert reached[0] == 1.0 and last.sum() == pytest.approx(1.0)
    for place, node in enumerate(tree.nodes[1:], 1):
        siblings = [n.rank for n in tree.nodes if n.parent == node.parent]
        assert sorted(siblings) == list(range(len(siblings))), f"node {place} skips a better sibling"


def test_more_inputs_never_give_fewer_tokens() -> None:
    tokens = [dynamic_trees(MEDUSA, inputs).tokens for inputs in (1, 2, 4, 8, 16, 32)]
    assert tokens[0] == 1.0
    assert all(later >= before - 1e-9 for before, later in itertools.pairwise(tokens))
    assert tokens[-1] > 1.9


def test_measured_latencies_choose_the_size() -> None:
    flat = fastest_trees(MEDUSA, {4: 1.0, 16: 1.0})
    steep = fastest_trees(MEDUSA, {1: 1.0, 4: 3.0, 16: 20.0})
    assert (flat.inputs, steep.inputs) == (16, 1)
    assert flat.rate == flat.tokens / 1.0


@pytest.mark.parametrize(
    ("rates", "word"),
    [
        ([[0.5, 0.7]], "at most one"),
        ([[0.2, 0.5]], "order the guesses"),
        ([0.5], "depths, ranks"),
        ([[-0.1]], "below 0"),
    ],
)
def test_rates_that_make_no_sense_are_told(rates: list[object], word: str) -> None:
    with pytest.raises(TreeError, match=word):
        dynamic_trees(np.array(rates, dtype=float), 4)


def test_limits_that_make_no_sense_are_told() -> None:
    with pytest.raises(TreeError, match="one token at least"):
        dynamic_trees(MEDUSA, 0)
    with pytest.raises(TreeError, match="seconds above 0"):
        fastest_trees(MEDUSA, {4: 0.0})
