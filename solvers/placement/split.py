"""How the tokens of an expert are split over its copies.

``even``: copies take equal parts, a token's copy chosen by a hash of its number and expert. ``nearest``: a copy on the
token's own rank, else one in its node, else any; equally near copies are shared out by source rank. The first is what
EPLB assumes, the second what SGLang's static dispatch does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.plan import Slots

SPLITS = ("even", "nearest")
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """Where an expert's copies lie in one layer: ``slots`` ``[experts, most copies]`` physical slots, -1 padded."""

    count: Ints
    slots: Ints
    slots_per_rank: int

    @classmethod
    def of(cls, table: Slots, num_experts: int) -> Copies:
        """The copies of a layer's table ``[ranks, slots per rank]``, in slot order."""
        flat = table.reshape(-1)
        used = np.flatnonzero(flat >= 0)
        order = used[np.argsort(flat[used], kind="stable")]
        count = np.bincount(flat[order], minlength=num_experts)
        slots = np.full((num_experts, int(count.max(initial=1))), -1, dtype=np.int64)
        start = np.cumsum(count) - count
        slots[flat[order], np.arange(len(order)) - start[flat[order]]] = order
        return cls(count, slots, table.shape[1])

    @property
    def ranks(self) -> Ints:
        """``[experts, most copies]``: the rank of each copy, -1 padded."""
        ranks: Ints = np.where(self.slots >= 0, self.slots // self.slots_per_rank, -1)
        return ranks


def token_copy(token: Ints, expert: NDArray[np.integer], count: NDArray[np.integer]) -> Ints:
    """Which of ``count`` copies a token uses under ``even``: multiplicative hashing of token number and expert.

    Fits signed 64-bit integers, so that any runtime can do the same.
    """
    mixed = (token % (1 << 30) * 2654435761 + expert.astype(np.int64) * 2246822519) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 73244475 & 0xFFFFFFFF
    copy: Ints = (mixed >> 12) % np.maximum(count, 1)
    return copy


def nearest_slots(copies: Copies, cluster: Cluster) -> Ints:
    """``[ranks, experts]``: the physical slot that each source rank sends an expert's tokens to under ``nearest``."""
    ranks = copies.ranks
    source = np.arange(cluster.num_ranks)
    node = cluster.node_of_rank[np.maximum(ranks, 0)]
    here = ranks[None] == source[:, None, None]
    near = node[None] == cluster.node_of_rank[:, None, None]
    distance = np.where(here, 0, np.where(near, 1, 2))
    distance = np.where(ranks[None] >= 0, distance, 3)
    best = distance == distance.min(2, keepdims=True)
    turn = (source[:, None] + np.arange(len(ranks))[None, :]) % best.sum(2)
    choice = (best & (np.cumsum(best, axis=2) == turn[:, :, None] + 1)).argmax(2)
    return np.asarray(np.take_along_axis(copies.slots[None], choice[:, :, None], axis=2)[:, :, 0])


def chosen_ranks(
    table: Slots,
    experts: NDArray[np.integer],
    tokens: Ints,
    sources: NDArray[np.integer],
    cluster: Cluster,
    split: str,
    num_experts: int,
) -> Ints:
    """The rank that serves each choice, ``[tokens, top_k]`` (-1: none); ``tokens`` are numbers in the batch."""
    copies = Copies.of(table, num_experts)
    expert = np.maximum(experts, 0)
    if split == "even":
        index = token_copy(tokens[:, None], expert, copies.count[expert])
        slot = copies.slots[expert, index]
    elif split == "nearest":
        slot = nearest_slots(copies, cluster)[sources[:, None], expert]
    else:
        raise PlacementError(f"split {split!r} was given; expected one of {', '.join(SPLITS)}")
    return np.where((experts >= 0) & (slot >= 0), slot // table.shape[1], -1)


def slot_shares(table: Slots, cluster: Cluster, split: str, num_experts: int) -> NDArray[np.float64]:
    """Part of its expert's tokens that each slot takes, ``[ranks, slots per rank]``; sources are spread evenly."""
    flat = table.reshape(-1)
    copies = Copies.of(table, num_experts)
    if split == "nearest":
        used = np.bincount(nearest_slots(copies, cluster)[:, copies.count > 0].ravel(), minlength=flat.size)
        return (used / cluster.num_ranks).reshape(table.shape)
    share = np.where(flat >= 0, 1.0 / np.maximum(copies.count[np.maximum(flat, 0)], 1), 0.0)
    return share.reshape(table.shape)
