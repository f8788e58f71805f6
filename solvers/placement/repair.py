"""Mends a layer's table in which one rank holds two copies of an expert, by swapping with the rank that suits best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.plan import Slots


def without_duplicates(table: Slots, num_experts: int, load: NDArray[np.float64] | None = None) -> Slots:
    """The table ``[ranks, slots]`` with no expert twice on a rank and every expert present.

    A second copy is swapped with a copy elsewhere whose load (``[experts]``, of one copy) is closest; where that is
    impossible, because an expert has more copies than there are ranks, it becomes a copy of the least copied expert.
    """
    table = table.copy()
    weight = np.zeros(num_experts) if load is None else load
    for rank, slot in duplicates(table):
        expert = table[rank, slot]
        holds = _presence(table, num_experts)
        fits = ~holds[:, expert][:, None] & ~holds[rank][table]
        if fits.any():
            distance = np.where(fits, np.abs(weight[table] - weight[expert]), np.inf)
            other = np.unravel_index(int(distance.argmin()), table.shape)
            table[rank, slot], table[other] = table[other], expert
        else:
            table[rank, slot] = _least_copied(table, rank, num_experts)
    return table


def refilled(table: Slots, num_experts: int, load: NDArray[np.float64]) -> Slots:
    """The table with each second copy on a rank given up for the expert, not there yet, whose copies carry most.

    ``load`` ``[experts]`` are an expert's tokens over all its copies. Where all experts lie on the rank, it stays.
    """
    table = table.copy()
    for rank, slot in duplicates(table):
        copies = np.bincount(table[table >= 0], minlength=num_experts).astype(np.float64)
        copies[table[rank, slot]] -= 1.0
        carried = load / np.maximum(copies, 1e-12)
        carried[table[rank]] = -np.inf
        if np.isfinite(carried).any():
            table[rank, slot] = int(carried.argmax())
    return table


def duplicates(table: Slots) -> list[tuple[int, int]]:
    """(rank, slot) of every copy whose expert the rank holds in an earlier slot."""
    order = np.argsort(table, axis=1, kind="stable")
    ordered = np.take_along_axis(table, order, axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    rank, place = np.nonzero(again)
    return [(int(r), int(order[r, p + 1])) for r, p in zip(rank, place, strict=True)]


def _presence(table: Slots, num_experts: int) -> NDArray[np.bool_]:
    held = np.zeros((len(table), num_experts), dtype=bool)
    held[np.arange(len(table))[:, None], table] = True
    return held


def _least_copied(table: Slots, rank: int, num_experts: int) -> int:
    copies = np.bincount(table.reshape(-1), minlength=num_experts).astype(np.float64)
    copies[table[rank]] = np.inf
    if not np.isfinite(copies).any():
        raise PlacementError(f"rank {rank} has more slots than there are experts ({num_experts}); use fewer")
    return int(copies.argmin())
