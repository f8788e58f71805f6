"""Language models with more heads than one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, causal, join

CLASSES, TOKENS = 48, 3


class _Trunk(Projections):
    def trunk(self, x: Tensor) -> Tensor:
        return x + self.out(join(attend(*self.split(x), causal(x.shape[1]))))


class MultiToken(_Trunk):
    """GOAT-TTS (arXiv:2504.12339): a head for each of the next tokens, all on one trunk: ``[batch, TOKENS, …]``."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, classes: int = CLASSES) -> None:
        super().__init__(width, heads)
        self.heads_of_tokens = nn.ModuleList(nn.Linear(width, classes) for _ in range(TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        last = self.trunk(x)
        return torch.stack([head(last) for head in self.heads_of_tokens], 1)


class Auxiliary(_Trunk):
    """CAFT (arXiv:2506.07833): heads for later tokens help training; inference reads the first alone."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, classes: int = CLASSES) -> None:
        super().__init__(width, heads)
        self.main = nn.Linear(width, classes)
        self.auxiliary = nn.ModuleList(nn.Linear(width, classes) for _ in range(TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        last = self.trunk(x)
        later = [head(last) for head in self.auxiliary]
        assert len(later) == TOKENS
        return self.main(last)
