"""Visual Dependency Transformers (arXiv:2304.03282): children send to their parents along transposed attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, join


class ReversedAttention(Projections):
    """o_j = sum_i softmax_j(s_ij) p_h(i) m(i) v_i; p chooses a head for each child, m whether it sends at all."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.choose = nn.Linear(width, heads)
        self.gate = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        choice = self.choose(x).softmax(-1).transpose(1, 2)[..., None]
        sent = torch.sigmoid(self.gate(x))[:, None]
        return self.out(join(weights.transpose(-2, -1) @ (value * choice * sent)))
