"""TokenFormer (arXiv:2410.23168): tokens attend to parameters, with a norm in place of a softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.parts import WIDTH

TOKENS = 48


class ParameterAttention(nn.Module):
    """Theta(x K^T) V of parameters ``[tokens, width]``; ``normed_first`` norms the scores in front of the GELU."""

    def __init__(self, normed_first: bool, width: int = WIDTH, tokens: int = TOKENS) -> None:
        super().__init__()
        self.normed_first = normed_first
        self.keys, self.values = (nn.Parameter(torch.randn(tokens, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.keys.mT
        if self.normed_first:
            weights = F.gelu(scores / scores.norm(2, -1, keepdim=True) * math.sqrt(self.keys.shape[0]))
        else:
            active = F.gelu(scores)
            weights = active / active.norm(2, -1, keepdim=True) * math.sqrt(self.keys.shape[0])
        return weights @ self.values


class TokenFormer(nn.Module):
    """Two layers of parameter attention with a residual."""

    def __init__(self, normed_first: bool, width: int = WIDTH, tokens: int = TOKENS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ParameterAttention(normed_first, width, tokens) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x
