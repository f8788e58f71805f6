"""A tree of drafts as data, and what is known about drafts: how often each is accepted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.tree.errors import TreeError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Node:
    """A candidate token: its parent's place in the tree (-1 for the root, the token that is known), its depth, its rank
    among the drafter's guesses there, and the prompt tokens behind it that draft the next step."""

    parent: int
    depth: int
    rank: int
    prompts: int = 0


@dataclass(frozen=True)
class Tree:
    """Nodes in an order in which parents come first; the first is the root."""

    nodes: tuple[Node, ...]

    @property
    def inputs(self) -> int:
        """Tokens that a pass computes: nodes, and their prompt tokens."""
        return len(self.nodes) + sum(node.prompts for node in self.nodes)

    def chances(self, acceptance: Floats) -> tuple[Floats, Floats]:
        """For each node, the chance that it is accepted, and that it is the last one."""
        reached = np.ones(len(self.nodes))
        last = np.ones(len(self.nodes))
        for place, node in enumerate(self.nodes):
            if node.parent >= 0:
                step = acceptance[node.depth - 1, node.rank]
                reached[place] = reached[node.parent] * step
                last[node.parent] -= step
        return reached, reached * last


def checked(acceptance: Floats) -> Floats:
    """``[depths, ranks]``: the chance that the guess of a rank, at a depth below an accepted token, is the right one.
    Guesses of one depth exclude each other. Raises ``TreeError`` where that cannot be."""
    rates = np.asarray(acceptance, dtype=np.float64)
    if rates.ndim != 2 or not rates.size or not np.isfinite(rates).all():
        raise TreeError(f"acceptance rates of shape {rates.shape} were given; give finite numbers, [depths, ranks]")
    if (rates < 0).any() or (rates.sum(1) > 1 + 1e-9).any():
        raise TreeError(
            "acceptance rates below 0, or of more than 1 at one depth, were given: at most one guess is right"
        )
    if (np.diff(rates, axis=1) > 1e-12).any():
        raise TreeError("acceptance rates rise with the rank; order the guesses of each depth by their rate")
    return rates
