"""Clusters to ranks along a chain of layers: what flows between consecutive layers pays for the ranks it goes between.

This is MoETuner's second problem (arXiv 2502.06643, section 5.2) for clusters of equal size, where it needs no integer
program: exact by dynamic programming over all permutations for few ranks, by sweeps of assignment problems for more.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.assignment import assign

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
#: 720 permutations; one rank more would be 5040, and 25 million pairs of them.
EXACT_RANKS = 6


def assign_chain(flows: Array, cost: Array, restarts: int = 4, seed: int = 0, sweeps: int = 20) -> Ints:
    """The rank of each cluster, ``[layers, ranks]``, that makes the sum of flow times cost small.

    ``flows`` ``[layers - 1, clusters, clusters]`` go from a layer's cluster to the next layer's, ``cost``
    ``[ranks, ranks]`` is paid from rank to rank. Exact for up to ``EXACT_RANKS`` ranks; else the best of sweeps from
    the identity, from a forward pass and from ``restarts`` random starts.
    """
    ranks = len(cost)
    if ranks <= EXACT_RANKS:
        return _exact(flows, cost)
    generator = np.random.default_rng(seed)
    layers = len(flows) + 1
    starts = [np.tile(np.arange(ranks), (layers, 1)), _forward(flows, cost)]
    starts += [np.stack([generator.permutation(ranks) for _ in range(layers)]) for _ in range(restarts)]
    found = [_sweep(flows, cost, start, sweeps) for start in starts]
    return min(found, key=lambda places: chain_cost(flows, cost, places))


def chain_cost(flows: Array, cost: Array, places: Ints) -> float:
    """Sum over consecutive layers of flow times cost."""
    return float(sum((flow * cost[np.ix_(places[at], places[at + 1])]).sum() for at, flow in enumerate(flows)))


def _exact(flows: Array, cost: Array) -> Ints:
    ranks = len(cost)
    every = np.array(list(permutations(range(ranks))), dtype=np.int64)
    one_hot = np.eye(ranks)[every].reshape(len(every), -1)
    best = np.zeros(len(every))
    came_from = []
    for flow in flows:
        # For each permutation p of this layer: what cluster b of the next layer pays on rank g.
        pays = np.einsum("ab,pag->pbg", flow, cost[every]).reshape(len(every), -1)
        total = best[:, None] + pays @ one_hot.T
        came_from.append(total.argmin(0))
        best = total.min(0)
    chosen = [int(best.argmin())]
    for back in reversed(came_from):
        chosen.append(int(back[chosen[-1]]))
    return every[chosen[::-1]]


def _forward(flows: Array, cost: Array) -> Ints:
    places = [np.arange(len(cost))]
    for flow in flows:
        places.append(assign(flow.T @ cost[places[-1]]))
    return np.stack(places)


def _sweep(flows: Array, cost: Array, places: Ints, sweeps: int) -> Ints:
    """Solve one layer at a time, its neighbours held, until nothing changes."""
    places = places.copy()
    layers = len(places)
    for _ in range(sweeps):
        changed = False
        for at in range(layers):
            pays = np.zeros(cost.shape)
            if at:
                pays += flows[at - 1].T @ cost[places[at - 1]]
            if at + 1 < layers:
                pays += flows[at] @ cost.T[places[at + 1]]
            found = assign(pays)
            rows = np.arange(len(cost))
            if pays[rows, found].sum() < pays[rows, places[at]].sum() - 1e-12 * (1.0 + abs(pays).sum()):
                places[at], changed = found, True
        if not changed:
            break
    return places
