"""The dynamic sparse tree of Parallel Prompt Decoding (Chen et al., arXiv:2405.18628), exactly.

A step verifies candidates as deep as the prompt tokens of the step before have drafted; prompt tokens behind the last
accepted node draft for the next. Which tree to use in each state (drafted depths), of a given number of inputs, is a
Markov decision process: what a step gives is its accepted tokens, where it leads is decided by the prompts of the node
that is accepted last. Relative value iteration solves it, with a bound on what is missing (MacQueen, 1966). The best
tree of a step under given values of the next states is found by dynamic programming over depth and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from regraft.solvers.tree.errors import TreeError
from regraft.solvers.tree.model import Floats, Node, Tree, checked

_DAMPING = 0.9  # keeps periodic chains from going round and round
_NONE = -np.inf


@dataclass(frozen=True)
class Trees:
    """A tree for each state (drafted depths, from 0), all of at most ``inputs`` tokens. ``tokens``: accepted ones a
    step in the long run, the known one included; no choice of trees gives more than ``bound``."""

    inputs: int
    trees: tuple[Tree, ...]
    tokens: float
    bound: float
    seconds: float = float("nan")

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def fastest_trees(acceptance: Floats, latencies: Mapping[int, float]) -> Trees:
    """The trees that give the most tokens a second. ``latencies``: seconds of a verifying pass by its number of inputs,
    as measured; only these numbers are considered. Raises ``TreeError`` for numbers that make no sense."""
    if not latencies or any(count < 1 or not 0 < seconds < np.inf for count, seconds in latencies.items()):
        raise TreeError("latencies must name one number of inputs or more, each 1 or more, with seconds above 0")
    found = (dynamic_trees(acceptance, count) for count in sorted(latencies))
    timed = [Trees(t.inputs, t.trees, t.tokens, t.bound, latencies[t.inputs]) for t in found]
    return max(timed, key=lambda trees: trees.rate)


def dynamic_trees(acceptance: Floats, inputs: int, tolerance: float = 1e-9, most_steps: int = 10_000) -> Trees:
    """The trees of ``inputs`` tokens that give the most tokens a step. ``acceptance`` as of ``model.checked``. Stops
    when the bound is within ``tolerance`` of what the trees give, or after ``most_steps``; the bound holds either
    way."""
    rates = checked(acceptance)
    if inputs < 1:
        raise TreeError(f"{inputs} inputs were given; a pass computes one token at least")
    states = len(rates) + 1
    value = np.zeros(states)
    for _ in range(most_steps):
        plan = _Plan(rates, inputs, value)
        gain = np.array([plan.best(state) for state in range(states)]) - value
        if gain.max() - gain.min() <= tolerance:
            break
        value = value + _DAMPING * (gain - gain[0])
        value -= value[0]
    trees = tuple(plan.tree(state) for state in range(states))
    return Trees(inputs, trees, long_run(rates, trees), float(gain.max()))


def long_run(acceptance: Floats, trees: tuple[Tree, ...]) -> float:
    """Tokens a step in the long run, from no drafts at the start, when the tree of each state is used."""
    states = len(trees)
    reward, move = np.zeros(states), np.zeros((states, states))
    for state, tree in enumerate(trees):
        reached, last = tree.chances(acceptance)
        reward[state] = reached.sum()
        for node, chance in zip(tree.nodes, last, strict=True):
            move[state, node.prompts] += chance
    lazy = 0.5 * (move + np.eye(states))  # the same long run, and no cycles
    start = np.zeros(states)
    start[0] = 1.0
    return float(start @ np.linalg.matrix_power(lazy, 1 << 20) @ reward)


class _Plan:
    """The best trees of one step when the state that follows is worth ``value``.

    ``worth[depth][b]``: what a node at a depth is worth with exactly ``b`` inputs for itself, its prompts and all
    below it, given that it is accepted: one token, what its children add, and the state that its prompts lead to where
    none of them is accepted. A child of rank r, worth w, adds ``p_r (w - value)``; larger rates take larger shares, so
    that the children are the first ranks."""

    def __init__(self, rates: Floats, inputs: int, value: Floats) -> None:
        self.rates, self.inputs, self.value = rates, inputs, value
        self._known: dict[tuple[int, int], Floats] = {}

    def best(self, state: int) -> float:
        """What a step is worth in a state."""
        return float(self._worth(0, state).max())

    def tree(self, state: int) -> Tree:
        """The tree that is worth it."""
        worth = self._worth(0, state)
        nodes: list[Node] = []
        self._grow(nodes, -1, 0, 0, state, int(worth.argmax()))
        return Tree(tuple(nodes))

    def _worth(self, depth: int, state: int) -> Floats:
        """By inputs, 0 to ``inputs``; minus infinity where so many cannot be used."""
        key = depth, state
        if key not in self._known:
            choices = [self._with(depth, state, prompts) for prompts in range(len(self.value))]
            self._known[key] = np.max([choice[-1] for choice in choices], axis=0)
        return self._known[key]

    def _with(self, depth: int, state: int, prompts: int) -> list[Floats]:
        """The worth of a node with so many prompts after its first 0, 1, … ranks were given inputs or not."""
        total = np.full(self.inputs + 1, _NONE)
        if prompts + 1 <= self.inputs:
            total[prompts + 1] = 1.0 + self.value[prompts]
        tables = [total]
        if depth < state:
            below = self._worth(depth + 1, state) - self.value[prompts]
            for rate in self.rates[depth]:
                more = tables[-1].copy()
                for share in range(1, self.inputs):
                    if below[share] > _NONE:
                        gained = tables[-1][:-share] + rate * below[share]
                        np.maximum(more[share:], gained, out=more[share:])
                tables.append(more)
        return tables

    def _grow(self, nodes: list[Node], parent: int, depth: int, rank: int, state: int, inputs: int) -> None:
        """Append the node that is worth most with exactly so many inputs, and all below it."""
        choices = [self._with(depth, state, prompts) for prompts in range(len(self.value))]
        prompts = int(np.argmax([tables[-1][inputs] for tables in choices]))
        tables, place = choices[prompts], len(nodes)
        nodes.append(Node(parent, depth, rank, prompts))
        below = self._worth(depth + 1, state) - self.value[prompts] if depth < state else np.empty(0)
        shares: list[tuple[int, int]] = []
        left = inputs
        for place_of_rank in range(len(tables) - 1, 0, -1):
            before, rate = tables[place_of_rank - 1], self.rates[depth, place_of_rank - 1]
            gains = [before[left]] + [before[left - share] + rate * below[share] for share in range(1, left)]
            share = int(np.argmax(gains))
            left -= share
            if share:
                shares.append((place_of_rank - 1, share))
        for child, share in reversed(shares):
            self._grow(nodes, place, depth + 1, child, state, share)
