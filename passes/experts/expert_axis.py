"""What becomes of a tensor when the experts are permuted, and how an operator carries that from inputs to output.

With ``order`` the permutation and ``P`` that of its blocks (the router groups; the experts themselves are blocks of
one), a tensor is one of:

================  ==========================================================================================
``SAME``          its value does not change
``Along``         entries along ``dim`` move: new = old.index_select(dim, P)
``Grouped``       ``[…, groups, experts of a group, …]`` at ``dim`` and the next: groups move by P, and the
                  experts of each group by an order of its own
``Numbers``       it holds numbers of blocks: new = inverse of P at old
================  ==========================================================================================

Dims count from the end, as broadcasting does. This file holds what shapes alone decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Same:
    """The value does not change."""


@dataclass(frozen=True)
class Along:
    """Entries along ``dim`` move with the ``parts`` blocks that the experts are seen as."""

    dim: int
    parts: int


@dataclass(frozen=True)
class Grouped:
    """``parts`` groups lie along ``dim``, the experts of each along ``dim + 1``."""

    dim: int
    parts: int


@dataclass(frozen=True)
class Numbers:
    """Numbers of the ``parts`` blocks."""

    parts: int


SAME = Same()
Effect = Same | Along | Grouped | Numbers
Shape = tuple[Any, ...]


def width(effect: Along | Grouped) -> int:
    """How many dims the effect spans."""
    return 2 if isinstance(effect, Grouped) else 1


def spanned(effect: Along | Grouped) -> range:
    """The dims that the effect spans."""
    return range(effect.dim, effect.dim + width(effect))


def reshaped(effect: Along | Grouped, before: Shape, after: Shape, experts: int) -> Along | Grouped | None:
    """Through a reshape: the axis may be kept, split into groups, or merged from them; None where it is cut."""
    inner = _inner(before, effect.dim + width(effect))
    if inner is None:
        return None
    kept = before[len(before) + effect.dim : len(before) + effect.dim + width(effect)]
    whole = math.prod(kept)
    for dim in range(-len(after), 0):
        if _inner(after, dim + 1) == inner and after[dim] == whole:
            if isinstance(effect, Along):
                return replace(effect, dim=dim)
            return Along(dim, experts)
        if dim < -1 and _inner(after, dim + 2) == inner and _are_numbers(after[dim : dim + 2] or after[dim:]):
            pair = (after[dim], after[dim + 1])
            if isinstance(effect, Grouped) and pair == kept:
                return replace(effect, dim=dim)
            if isinstance(effect, Along) and effect.parts == experts and math.prod(pair) == whole and 1 not in pair:
                return Grouped(dim, pair[0])
    return None


def permuted(effect: Along | Grouped, dims: Iterable[int]) -> Along | Grouped | None:
    """Through a permutation of the dims; None where groups and their experts are no longer neighbours."""
    order = list(dims)
    count = len(order)
    places = [[dim % count for dim in order].index(dim % count) - count for dim in spanned(effect)]
    if len(places) == 2 and places[1] != places[0] + 1:
        return None
    return replace(effect, dim=places[0])


def without(effect: Along | Grouped, dims: Iterable[int], keep: bool) -> Effect | None:
    """After a symmetric reduction over ``dims`` (from the end): over the whole axis nothing moves any more, over the
    experts of each group the groups move; None for a reduction over groups alone."""
    gone = set(dims)
    hit = [dim for dim in spanned(effect) if dim in gone]
    if len(hit) == width(effect):
        return SAME
    moved = effect.dim if keep else effect.dim + sum(dim > effect.dim for dim in gone)
    if not hit:
        return replace(effect, dim=moved)
    return Along(moved, effect.parts) if hit == [effect.dim + 1] else None


def expanded(effect: Along | Grouped, before: Shape, after: Shape, experts: int) -> Along | Grouped:
    """Through an expand: groups whose values are repeated for each of their experts hold experts."""
    following = effect.dim + 1
    if isinstance(effect, Along) and effect.parts != experts and following < 0:
        repeated = before[following] == 1 and after[following] == experts // effect.parts
        return Grouped(effect.dim, effect.parts) if repeated else effect
    return effect


def _inner(shape: Shape, start: int) -> int | None:
    """Elements of the dims from ``start`` (from the end, 0: none are left); None where one is symbolic."""
    sizes = shape[len(shape) + start :]
    return math.prod(sizes) if _are_numbers(sizes) else None


def _are_numbers(sizes: Iterable[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)
