"""How many tokens reach each place (node or rank), and how that changes when two items change places.

``TokenReach`` counts sampled tokens exactly: tokens that reach a place through one item alone leave with it, tokens
that had nothing there arrive with it, and tokens that chose both items stay. ``ChanceReach`` does it for counts alone,
taking experts to be chosen independently; ``MessageReach`` counts every choice as a message.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.auto.items import Array, Ints, Items


class Reach(Protocol):
    """Parts of the tokens that reach places, ``[scenarios, places]``, kept up to date while items move."""

    place: Ints

    @property
    def parts(self) -> Array:
        """Parts of the tokens that reach each place."""

    def after(self, first: Ints, second: Ints) -> tuple[Array, Array]:
        """Parts at the places of ``first`` and of ``second`` after each swap, ``[scenarios, swaps]`` each."""

    def swap(self, first: int, second: int) -> None:
        """Let two items change places."""

    def saving(self, weights: Array) -> Array | None:
        """Change of the weighted sum of all parts for every swap, ``[items, items]``; None where not known."""

    def copy(self) -> Reach:
        """The same state, to change apart."""


class TokenReach:
    """Exact on sampled tokens."""

    def __init__(self, items: Items, place: Ints, num_places: int) -> None:
        self.items, self.place, self.num_places = items, place.copy(), num_places
        self.tokens = [tokens for tokens in items.tokens if tokens is not None]
        self.sizes = np.array([len(tokens) for tokens in self.tokens], dtype=np.float64)
        self.holders = [_holders(tokens, items.number) for tokens in self.tokens]
        number = items.number
        self.alone = np.zeros((len(self.tokens), number))
        self.joins = np.zeros((len(self.tokens), number, num_places))
        self.both = np.zeros((len(self.tokens), number, number))
        self.reached = np.zeros((len(self.tokens), num_places))
        for scenario, tokens in enumerate(self.tokens):
            self._count(scenario, tokens, 1.0, np.arange(num_places))

    @property
    def parts(self) -> Array:
        """Parts of the tokens that reach each place."""
        parts: Array = self.reached / self.sizes[:, None]
        return parts

    def copy(self) -> TokenReach:
        """The same state, to change apart."""
        twin = object.__new__(TokenReach)
        twin.__dict__.update(self.__dict__)
        for name in ("place", "alone", "joins", "both", "reached"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def after(self, first: Ints, second: Ints) -> tuple[Array, Array]:
        """Parts at both items' places after each swap."""
        here, there = self.place[first], self.place[second]
        at_first = self.reached[:, here] - self.alone[:, first] + self.joins[:, second, here]
        at_second = self.reached[:, there] - self.alone[:, second] + self.joins[:, first, there]
        at_first += self.both[:, first, second]
        at_second += self.both[:, second, first]
        same = here == there
        at_first[:, same] = self.reached[:, here[same]]
        at_second[:, same] = self.reached[:, there[same]]
        return at_first / self.sizes[:, None], at_second / self.sizes[:, None]

    def saving(self, weights: Array) -> Array | None:
        """Change of the weighted sum of parts for every swap."""
        scale = weights / self.sizes
        alone = scale @ self.alone
        joins = np.tensordot(scale, self.joins, 1)[:, self.place]
        both = np.tensordot(scale, self.both, 1)
        change: Array = joins + joins.T + both + both.T - alone[:, None] - alone[None, :]
        change[self.place[:, None] == self.place[None, :]] = 0.0
        return change

    def swap(self, first: int, second: int) -> None:
        """Let two items change places; only tokens that chose either, at both places, are counted anew."""
        both_places = np.array([self.place[first], self.place[second]])
        chosen = [
            tokens[np.union1d(holders[first], holders[second])]
            for tokens, holders in zip(self.tokens, self.holders, strict=True)
        ]
        for scenario, tokens in enumerate(chosen):
            self._count(scenario, tokens, -1.0, both_places)
        self.place[first], self.place[second] = self.place[second], self.place[first]
        for scenario, tokens in enumerate(chosen):
            self._count(scenario, tokens, 1.0, both_places)

    def _count(self, scenario: int, tokens: Ints, sign: float, places: Ints) -> None:
        """Add (or take away) what these tokens contribute to the tables at some places."""
        used = tokens >= 0
        place = np.where(used, self.place[np.maximum(tokens, 0)], -1)
        here = place[:, :, None] == places
        held = here.sum(1)
        found = held > 0
        self.reached[scenario][places] += sign * found.sum(0)
        alone = (here & (held == 1)[:, None, :]).any(2)
        self.alone[scenario] += sign * np.bincount(tokens[alone], minlength=self.items.number)
        token, choice = np.nonzero(used)
        joined = _rows_by(tokens[token, choice], ~found[token], self.items.number)
        self.joins[scenario][:, places] += sign * joined
        token, choice = np.nonzero(alone)
        first, second = np.broadcast_arrays(tokens[token, choice][:, None], tokens[token])
        np.add.at(self.both[scenario], (first[used[token]], second[used[token]]), sign)


class ChanceReach:
    """From counts alone: a token misses a place when it misses each of its items, independently."""

    def __init__(self, items: Items, place: Ints, num_places: int, tokens: Array) -> None:
        """``tokens`` ``[scenarios]``: tokens of each scenario's mean batch."""
        self.place, self.num_places = place.copy(), num_places
        chance = (items.mean @ items.load) / np.maximum(tokens, 1e-12)[:, None]
        self.missed = np.log1p(-np.minimum(chance, 1.0 - 1e-9))
        self.sums = np.stack([np.bincount(place, row, minlength=num_places) for row in self.missed])

    @property
    def parts(self) -> Array:
        """Parts of the tokens that reach each place."""
        parts: Array = 1.0 - np.exp(self.sums)
        return parts

    def copy(self) -> ChanceReach:
        """The same state, to change apart."""
        twin = object.__new__(ChanceReach)
        twin.__dict__.update(self.__dict__)
        twin.place, twin.sums = self.place.copy(), self.sums.copy()
        return twin

    def after(self, first: Ints, second: Ints) -> tuple[Array, Array]:
        """Parts at both items' places after each swap."""
        change = np.where(self.place[first] == self.place[second], 0.0, self.missed[:, second] - self.missed[:, first])
        at_first = 1.0 - np.exp(self.sums[:, self.place[first]] + change)
        return at_first, 1.0 - np.exp(self.sums[:, self.place[second]] - change)

    def saving(self, weights: Array) -> Array | None:
        """Counts alone do not say which items belong together."""
        return None

    def swap(self, first: int, second: int) -> None:
        """Let two items change places."""
        here, there = self.place[first], self.place[second]
        change = self.missed[:, second] - self.missed[:, first]
        self.sums[:, here] += change
        self.sums[:, there] -= change
        self.place[first], self.place[second] = there, here


class MessageReach:
    """Every choice is a message of its own, whatever else the token chose; parts are messages per token."""

    def __init__(self, items: Items, place: Ints, num_places: int, tokens: Array) -> None:
        """``tokens`` ``[scenarios]``: tokens of each scenario's mean batch."""
        self.place = place.copy()
        self.messages = (items.mean @ items.load) / np.maximum(tokens, 1e-12)[:, None]
        self.sums: Array = np.stack([np.bincount(place, row, minlength=num_places) for row in self.messages])

    @property
    def parts(self) -> Array:
        """Messages per token to each place."""
        return self.sums

    def copy(self) -> MessageReach:
        """The same state, to change apart."""
        twin = object.__new__(MessageReach)
        twin.__dict__.update(self.__dict__)
        twin.place, twin.sums = self.place.copy(), self.sums.copy()
        return twin

    def after(self, first: Ints, second: Ints) -> tuple[Array, Array]:
        """Messages at both items' places after each swap."""
        same = self.place[first] == self.place[second]
        change = np.where(same, 0.0, self.messages[:, second] - self.messages[:, first])
        return self.sums[:, self.place[first]] + change, self.sums[:, self.place[second]] - change

    def saving(self, weights: Array) -> Array | None:
        """The sum of messages does not depend on places."""
        return None

    def swap(self, first: int, second: int) -> None:
        """Let two items change places."""
        here, there = self.place[first], self.place[second]
        change = self.messages[:, second] - self.messages[:, first]
        self.sums[:, here] += change
        self.sums[:, there] -= change
        self.place[first], self.place[second] = there, here


def _rows_by(group: Ints, rows: NDArray[np.bool_], size: int) -> Array:
    """Sums of boolean rows by group, ``[size, columns]``."""
    entry, column = np.nonzero(rows)
    width = rows.shape[1]
    return np.bincount(group[entry] * width + column, minlength=size * width).reshape(size, width).astype(np.float64)


def _holders(tokens: Ints, number: int) -> list[Ints]:
    """The tokens that chose each item."""
    token, column = np.nonzero(tokens >= 0)
    item = tokens[token, column]
    order = np.argsort(item, kind="stable")
    return np.split(token[order], np.cumsum(np.bincount(item, minlength=number))[:-1])
