"""Models that drop tokens themselves: DynamicViT (arXiv:2106.02034) and DependencyViT-Lite (arXiv:2304.03282)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join

LEFT = 9


def keep(x: Tensor, score: Tensor, left: int) -> Tensor:
    """The ``left`` tokens of the highest score, in their order; the first token always."""
    order = score[:, 1:].topk(left - 1, dim=-1).indices.sort(-1).values + 1
    index = torch.cat((torch.zeros_like(order[:, :1]), order), dim=1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class DynamicViT(nn.Module):
    """A predictor reads each token beside the mean of all; those that it likes go on."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, left: int = LEFT) -> None:
        super().__init__()
        self.left = left
        self.first, self.second = Projections(width, heads), Projections(width, heads)
        self.inner, self.judge = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first.out(join(attend(*self.first.split(x))))
        local = nn.functional.gelu(self.inner(x))
        half = x.shape[-1] // 2
        both = torch.cat((local[..., :half], local[..., half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)), -1)
        x = keep(x, self.judge(both).log_softmax(-1)[..., 0], self.left)
        return x + self.second.out(join(attend(*self.second.split(x))))


class LeafPruning(nn.Module):
    """Reversed attention whose message strengths fall; leaves, which send least, are dropped."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, left: int = LEFT) -> None:
        super().__init__()
        self.left = left
        self.first, self.second = Projections(width, heads), Projections(width, heads)
        self.gate = nn.Linear(width, 1)

    def send(self, layer: Projections, x: Tensor, strength: Tensor) -> Tensor:
        """What each token receives."""
        query, key, value = layer.split(x)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return layer.out(join(weights.mT @ (value * strength[:, None])))

    def forward(self, x: Tensor) -> Tensor:
        strength = torch.sigmoid(self.gate(x))
        x = x + self.send(self.first, x, strength)
        both = keep(torch.cat((x, strength), dim=-1), strength[..., 0], self.left)
        x, strength = both[..., :-1], both[..., -1:]
        return x + self.send(self.second, x, strength * torch.sigmoid(self.gate(x)))
