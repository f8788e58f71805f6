"""Items that tokens choose together, into groups of given sizes: spectral embedding, then swaps."""

from __future__ import annotations

import numpy as np

from regraft.solvers.placement.auto.items import Array, Ints, Items

_SWEEPS = 300


def coactivation(items: Items) -> Array:
    """Tokens that chose both items, ``[items, items]``, every scenario's sample weighing the same."""
    number = items.number
    together = np.zeros((number, number))
    for tokens in items.tokens:
        if tokens is None:
            continue
        own = np.zeros(number * number)
        for first in range(tokens.shape[1]):
            for second in range(first + 1, tokens.shape[1]):
                used = (tokens[:, first] >= 0) & (tokens[:, second] >= 0)
                pair = tokens[used, first] * number + tokens[used, second]
                own += np.bincount(pair, minlength=number * number)
        together += own.reshape(number, number) / max(len(tokens), 1)
    return together + together.T


def clusters(similarity: Array, sizes: Ints, seed: int) -> Ints:
    """The cluster of each item, ``[items]``, with ``sizes`` items in each, similar ones together.

    Rows of the leading eigenvectors of the normalised similarity (Ng, Jordan and Weiss 2002) are seeded far apart and
    assigned by largest affinity while there is room; then pairs are swapped while the similarity inside grows.
    """
    number, count = len(similarity), len(sizes)
    if count == 1:
        return np.zeros(number, dtype=np.int64)
    degree = np.maximum(similarity.sum(1), 1e-12)
    normal = similarity / np.sqrt(np.outer(degree, degree))
    _, vectors = np.linalg.eigh(normal)
    rows = vectors[:, -count:]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centres = rows[_far_apart(rows, count, seed)]
    for _ in range(8):
        cluster = assign_with_room(rows @ centres.T, sizes)
        centres = np.stack([rows[cluster == number].mean(0) for number in range(count)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return swapped(normal, cluster, count)


def swapped(similarity: Array, cluster: Ints, count: int) -> Ints:
    """Swap the pair that adds most similarity inside clusters until none does (Kernighan and Lin 1970, greedy)."""
    cluster = cluster.copy()
    inside = similarity @ np.eye(count)[cluster]
    for _ in range(_SWEEPS):
        own = np.take_along_axis(inside, cluster[:, None], axis=1)[:, 0]
        to = inside[:, cluster]
        gain = to + to.T - own[:, None] - own[None, :] - 2.0 * similarity
        gain[cluster[:, None] == cluster[None, :]] = 0.0
        first, second = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[first, second] <= 1e-12:
            break
        here, there = cluster[first], cluster[second]
        change = similarity[:, second] - similarity[:, first]
        inside[:, here] += change
        inside[:, there] -= change
        cluster[first], cluster[second] = there, here
    return cluster


def assign_with_room(affinity: Array, sizes: Ints) -> Ints:
    """The cluster of each item by falling affinity ``[items, clusters]``, no cluster above its size."""
    room = sizes.tolist()
    count = affinity.shape[1]
    cluster = [-1] * len(affinity)
    left = len(affinity)
    for place in np.argsort(-affinity, axis=None, kind="stable").tolist():
        item, target = divmod(place, count)
        if cluster[item] < 0 and room[target] > 0:
            cluster[item] = target
            room[target] -= 1
            left -= 1
            if not left:
                break
    return np.array(cluster, dtype=np.int64)


def _far_apart(rows: Array, count: int, seed: int) -> list[int]:
    """Rows far from each other, the first drawn by ``seed``: each next has the least largest affinity."""
    chosen = [int(np.random.default_rng(seed).integers(len(rows)))]
    nearest = rows @ rows[chosen[0]]
    while len(chosen) < count:
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    return chosen
