"""Systems whose own part is a mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, causal, join


class SetBasedPrompting(Projections):
    """Set-Based Prompting (arXiv:2406.06581): members of a set do not see one another and start at the same place.

    ``member``: 0 outside of the set, else the number of the member, ``[batch, length]``; ``place``: positions.
    """

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.place = nn.Embedding(4096, width)

    def forward(self, x: Tensor, member: Tensor, place: Tensor) -> Tensor:
        query, key, value = self.split(x + self.place(place))
        row, column = member[:, None, :, None], member[:, None, None, :]
        apart = (row != 0) & (column != 0) & (row != column)
        return self.out(join(attend(query, key, value, causal(x.shape[1]) & ~apart)))


def members(lengths: tuple[int, ...], before: int, after: int) -> tuple[Tensor, Tensor]:
    """Member numbers and positions of a prefix, a set of parallel parts and a suffix."""
    numbers = [0] * before + [n + 1 for n, size in enumerate(lengths) for _ in range(size)] + [0] * after
    inside = [before + place for size in lengths for place in range(size)]
    places = [*range(before), *inside, *range(before + max(lengths), before + max(lengths) + after)]
    return torch.tensor([numbers]), torch.tensor([places])


class Switching(Projections):
    """BICO: the same weights read in both directions, or causally; ``both`` ``[batch]`` says which."""

    def forward(self, x: Tensor, both: Tensor) -> Tensor:
        query, key, value = self.split(x)
        seen = causal(x.shape[1]) | (both[:, None, None, None] != 0)
        return self.out(join(attend(query, key, value, seen)))


class Identity(nn.Module):
    """EmotionIC: one attention over utterances of the same speaker, one over those of others and oneself."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.own, self.others = Projections(width, heads), Projections(width, heads)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        same = speaker[:, None, :, None] == speaker[:, None, None, :]
        place = torch.arange(x.shape[1])
        itself = place == place[:, None]
        before = causal(x.shape[1])
        own = attend(*self.own.split(x), before & same)
        others = attend(*self.others.split(x), before & (~same | itself))
        return self.own.out(join(own)) + self.others.out(join(others))


class WordBlocks(Projections):
    """Learn Your Tokens (arXiv:2310.11628): characters attend within their word; ``word`` ``[batch, length]``."""

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return self.out(join(attend(query, key, value, word[:, None, :, None] == word[:, None, None, :])))


class Dilated(Projections):
    """A constant pattern: every third key of the last nine. Not a mask of the algebra, and few keys all the same."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        place = torch.arange(x.shape[1])
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < 9) & (distance % 3 == 0)
        return self.out(join(attend(query, key, value, seen)))
