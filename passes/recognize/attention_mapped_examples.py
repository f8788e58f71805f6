"""Examples and near misses of attention without a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir.rule import Example

_SCALE = 1 / math.sqrt(8)


def _heads(function: Callable[..., Any]) -> Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The function, and query, key and value ``[2, 4, 5, 8]``."""

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(0)
        return function, tuple(torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))

    return make


def _seen(query: Tensor) -> Tensor:
    place = torch.arange(query.shape[-2])
    return place <= place[:, None]


def _normalised(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.sigmoid(query @ key.mT * _SCALE) * _seen(query).float()
    return weights / (weights.sum(-1, keepdim=True) + 1e-8) @ value


def _linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (query @ key.mT) / math.sqrt(8) * _seen(query)
    return weights / weights.sum(-1, keepdim=True).abs().clamp(min=1.0) @ value


class _FeedForward(torch.nn.Module):
    """Keys and values that are parameters: the first is no transposed matrix, so that it stays a product."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (torch.nn.Parameter(torch.randn(1, 4, 8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.keys) @ self.values


def _weights_returned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.sigmoid(query @ key.mT)
    return weights @ value, weights


EXAMPLES = (
    Example("sigmoid", _heads(lambda q, k, v: torch.sigmoid(q @ k.mT * _SCALE) @ v)),
    Example("sigmoid, shifted", _heads(lambda q, k, v: torch.sigmoid(q @ k.mT * _SCALE - math.log(5)) @ v)),
    Example("sigmoid, less a tensor", _heads(lambda q, k, v: torch.sigmoid(q @ k.mT * _SCALE - k.mean()) @ v)),
    Example("sigmoid, masked by a factor, normalised", _heads(_normalised)),
    Example(
        "sigmoid of masked scores",
        _heads(lambda q, k, v: torch.sigmoid((q @ k.mT * _SCALE).masked_fill(~_seen(q), -math.inf)) @ v),
    ),
    Example("elu + 1, masked", _heads(lambda q, k, v: (F.elu(q @ k.mT * _SCALE) + 1).masked_fill(~_seen(q), 0.0) @ v)),
    Example("relu over the number of keys", _heads(lambda q, k, v: torch.relu(q @ k.mT) / 5 @ v)),
    Example("scores as they are, over max(|sum|, 1)", _heads(_linear)),
)
NEAR_MISSES = (
    Example("the weights are returned", _heads(_weights_returned), "attention weights are used outside the attention"),
    Example(
        "a feed-forward layer",
        lambda: (_FeedForward(), (torch.randn(2, 4, 5, 8),)),
        "keys are parameters: a feed-forward layer, no attention",
    ),
    Example(
        "divided by their maximum",
        _heads(lambda q, k, v: (w := torch.sigmoid(q @ k.mT)) / w.amax(-1, keepdim=True) @ v),
        "the weights are divided by something else than their sum over the keys",
    ),
    Example(
        "scaled after a shift",
        _heads(lambda q, k, v: torch.sigmoid((q @ k.mT + 1.5) * _SCALE) @ v),
        "scale after the scores are shifted",
    ),
    Example(
        "masked weights are one",
        _heads(lambda q, k, v: torch.sigmoid(q @ k.mT).masked_fill(~_seen(q), 1.0) @ v),
        "masked weights are 1.0, not 0",
    ),
    Example(
        "multiplied by a tensor of any numbers",
        _heads(lambda q, k, v: torch.sigmoid(q @ k.mT) * q.mean() @ v),
        "the scores are masked by mean, which may hold other numbers than 0 and 1",
    ),
)
