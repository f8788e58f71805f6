"""Which tokens go, and where each goes: the matchings of ``regraft::plan_merge``, by name.

A matching gives every token a rank (the higher, the sooner it goes) and a target, the token that it merges into; -1
drops it. It sees one sample at a time in all it computes, in fp32, and breaks ties by index, so that a sample's plan
depends on nothing else in its batch. Only tokens that are ``free`` get a rank above ``NEVER`` or become targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: The rank of a token that a matching does not remove.
NEVER = -float("inf")
_FIRST, _BEHIND = 1e30, 2.0  # above every rank; below every cosine when taken away from one
_PIVOTS = 8


@dataclass(frozen=True)
class Candidates:
    """What a matching reads. ``metric`` ``[batch, tokens, width]`` in fp32, rows of length one or zero; ``scores``
    ``[batch, tokens]``, the higher the more important, or None; ``free`` ``[batch, tokens]``: may be removed, and may
    be merged into. ``padded`` tokens are not. ``prefix`` tokens at the front are never free. ``causal``: a token may
    only merge into a later one.
    """

    metric: Tensor
    scores: Tensor | None
    free: Tensor
    padded: Tensor
    remove: int
    prefix: int
    causal: bool
    margin: float

    def similarity(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Cosines ``[batch, tokens, tokens]`` of sources with targets (both boolean masks); ``NEVER`` for the rest."""
        cosines = self.metric @ self.metric.transpose(-1, -2)
        allowed = sources[:, :, None] & targets[:, None, :]
        if self.causal:
            allowed = allowed & torch.ones_like(allowed[0]).triu(1)
        return cosines.masked_fill(~allowed, NEVER)


Matching = Callable[[Candidates], tuple[Tensor, Tensor]]


def bipartite(given: Candidates) -> tuple[Tensor, Tensor]:
    """Every second token may merge into the most similar of the others; the most similar pairs do.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
    """
    places = torch.arange(given.free.shape[1], device=given.free.device)
    even = (places - given.prefix) % 2 == 0
    best, target = given.similarity(given.free & even, given.free & ~even).max(-1)
    return best, target.masked_fill(best == NEVER, -1)


def energy(given: Candidates) -> tuple[Tensor, Tensor]:
    """The ``2 * remove`` tokens that lie closest to many others are paired off by turns in the order of their energy.

    ``E_i = mean_j elu(cos(i, j) - margin)`` over the free tokens (Tran et al., "Accelerating Transformers with
    Spectrum-Preserving Token Merging", NeurIPS 2024, equation 4).
    """
    cosines = given.similarity(given.free, given.free)
    near = torch.nn.functional.elu(cosines - given.margin).masked_fill(cosines == NEVER, 0.0)
    value = near.sum(-1) / given.free.sum(-1, keepdim=True).clamp(min=1)
    place = _places(value.masked_fill(~given.free, NEVER))
    chosen = given.free & (place < 2 * given.remove)
    best, target = given.similarity(chosen & (place % 2 == 0), chosen & (place % 2 == 1)).max(-1)
    return best, target.masked_fill(best == NEVER, -1)


def drop(given: Candidates) -> tuple[Tensor, Tensor]:
    """The tokens of the lowest scores are dropped, padded ones first."""
    rank = _low_scores(given)
    return rank, torch.full_like(rank, -1, dtype=torch.long)


def diverse(given: Candidates) -> tuple[Tensor, Tensor]:
    """Those are dropped that come last when tokens are taken one by one, each time the one whose closest among those
    taken is farthest. The prefix is taken to begin with; without any, the token that lies farthest from all others.

    After Alvar et al., "DivPrune", CVPR 2025: greedy max-min over cosine distances.
    """
    batch, tokens = given.free.shape
    cosines = given.metric @ given.metric.transpose(-1, -2)
    front = torch.arange(tokens, device=cosines.device) < given.prefix
    if given.prefix:
        closest = cosines.masked_fill(~front, -_FIRST).amax(-1)
    else:
        others = given.free[:, None, :] & ~torch.eye(tokens, dtype=torch.bool, device=cosines.device)
        closest = cosines.masked_fill(~others, -_FIRST).amax(-1)
    sample = torch.arange(batch, device=cosines.device)
    left, rank = given.free.clone(), torch.full_like(closest, NEVER)
    for number in range(tokens):
        taken = closest.masked_fill(~left, _FIRST).argmin(-1)
        there = left[sample, taken]
        rank[sample, taken] = torch.where(there, float(number), rank[sample, taken])
        left[sample, taken] = False
        near = cosines[sample, taken].masked_fill(~there[:, None], -_FIRST)
        closest = near if number == 0 and not given.prefix else torch.maximum(closest, near)
    rank = rank.masked_fill(given.padded, _FIRST)
    return rank, torch.full_like(rank, -1, dtype=torch.long)


def distinct(given: Candidates) -> tuple[Tensor, Tensor]:
    """Those are dropped that are most alike one of a few pivots, the tokens of the highest scores; pivots go last.

    After Wen et al., "DART", 2025 (arXiv 2502.11494): duplication rather than importance.
    """
    assert given.scores is not None
    place = _places(given.scores.masked_fill(~given.free, NEVER))
    pivots = given.free & (place < _PIVOTS)
    alike = given.metric @ given.metric.transpose(-1, -2)
    rank = alike.masked_fill(~pivots[:, None, :], -_BEHIND).amax(-1)
    rank = torch.where(pivots, place - (_BEHIND + _PIVOTS), rank)
    rank = rank.masked_fill(~given.free, NEVER).masked_fill(given.padded, _FIRST)
    return rank, torch.full_like(rank, -1, dtype=torch.long)


def fuse(given: Candidates) -> tuple[Tensor, Tensor]:
    """The tokens of the lowest scores become one token, in the place of the most important of them.

    After Liang et al., "EViT", ICLR 2022, section 3.2; the mean is weighted by sizes here, so that a constant stays
    itself.
    """
    rank = _low_scores(given)
    last = (_places(rank) == given.remove) & given.free
    into = torch.where(last.any(-1), last.long().argmax(-1), -1)
    return rank, into[:, None].expand(rank.shape)


def grid(given: Candidates) -> tuple[Tensor, Tensor]:
    """Evenly spaced tokens merge into the one that follows each: pooling that looks at nothing, a baseline."""
    number = given.free.long().cumsum(-1) - 1
    pairs = given.free.sum(-1, keepdim=True) // 2
    step = torch.arange(given.remove, device=number.device) * pairs // max(given.remove, 1)
    taken = (number[:, :, None] == 2 * step[:, None, :]).any(-1) & given.free & (number // 2 < pairs)
    places = torch.arange(number.shape[1], device=number.device).expand(number.shape)
    after = torch.where(given.free, places, number.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    target = torch.cat((after[:, 1:], after[:, -1:]), dim=-1)
    return torch.where(taken, 1.0, NEVER), target.masked_fill(~taken, -1)


#: Name -> matching.
MATCHINGS: dict[str, Matching] = {
    "bipartite": bipartite,
    "energy": energy,
    "drop": drop,
    "diverse": diverse,
    "distinct": distinct,
    "fuse": fuse,
    "grid": grid,
}
#: Matchings that need scores, and those that need two free tokens for each that goes.
SCORED = frozenset(("drop", "distinct", "fuse"))
PAIRED = frozenset(("bipartite", "energy", "grid"))
#: Matchings that drop what goes: nothing merges.
DROPPING = frozenset(("drop", "diverse", "distinct"))
#: Matchings that can keep to "a token only merges into a later one".
ORDERED = frozenset(("bipartite", "energy")) | DROPPING


def compared(matching: str, tokens: int) -> float:
    """How many pairs of ``tokens`` a matching takes the cosine of: half with half, pivots with all, or all with all."""
    pairs = {"bipartite": tokens / 4, "distinct": _PIVOTS, "energy": tokens, "diverse": tokens}
    return pairs.get(matching, 0.0) * tokens


def _low_scores(given: Candidates) -> Tensor:
    assert given.scores is not None
    return (-given.scores).masked_fill(~given.free, NEVER).masked_fill(given.padded, _FIRST)


def _places(value: Tensor) -> Tensor:
    """The place of every token in descending order of value, ties by index."""
    order = value.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1, stable=True)
