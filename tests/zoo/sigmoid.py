"""Attention without an attention sink (Gu et al., arXiv:2410.10781), and sinks made explicit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, causal, join


class SigmoidAttention(Projections):
    """sum_j sigmoid(s_ij) v_j over j <= i, the mask a factor of 0 or 1; divided by the sum where ``normalised``."""

    def __init__(self, normalised: bool = False, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.normalised = normalised

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        weights = torch.sigmoid(query @ key.mT / math.sqrt(query.shape[-1])) * causal(x.shape[1]).to(x.dtype)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
        return self.out(join(weights @ value))


class ShiftedSigmoid(Projections):
    """Scores shifted by the logarithm of the length, so that weights begin as those of a softmax (arXiv:2409.04431)."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = query @ key.mT / math.sqrt(query.shape[-1]) - math.log(x.shape[1])
        weights = torch.sigmoid(scores).masked_fill(~causal(x.shape[1]), 0.0)
        return self.out(join(weights @ value))


class EluAttention(Projections):
    """The kernel elu + 1 of scores, a plain sum over the keys that are seen."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = nn.functional.elu(query @ key.mT / math.sqrt(query.shape[-1])) + 1
        weights = scores.masked_fill(~causal(x.shape[1]), 0.0)
        return self.out(join(weights @ value))


class LinearAttention(Projections):
    """Scores as they are, divided by max(|sum|, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])) * causal(x.shape[1])
        total = weights.sum(-1, keepdim=True).abs().clamp(min=1.0)
        return self.out(join(weights / total @ value))


class KeyBias(Projections):
    """A learned key in front of all others, with a value of zero or a learned one; every row sees it."""

    def __init__(self, with_value: bool = False, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.bias_key = nn.Parameter(torch.randn(1, heads, 1, width // heads))
        self.bias_value = nn.Parameter(torch.randn(1, heads, 1, width // heads)) if with_value else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        batch = x.shape[0]
        front = self.bias_key.expand(batch, -1, -1, -1)
        held = torch.zeros_like(front) if self.bias_value is None else self.bias_value.expand(batch, -1, -1, -1)
        seen = torch.cat([torch.ones(x.shape[1], 1, dtype=torch.bool), causal(x.shape[1])], -1)
        return self.out(join(attend(query, torch.cat([front, key], 2), torch.cat([held, value], 2), seen)))


class LearnedSink(Projections):
    """A logit of each head that takes weight and gives nothing."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.sink = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~causal(x.shape[1]), -math.inf)
        column = self.sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        return self.out(join(weights @ value))


class SinkInFront(LearnedSink):
    """The same with the sink's column in front of the scores."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~causal(x.shape[1]), -math.inf)
        column = self.sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([column, scores], -1).softmax(-1)[..., 1:]
        return self.out(join(weights @ value))


class OneMore(Projections):
    """exp(s) / (1 + sum(exp(s))): a row may give no weight at all; the largest score or 0 is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~causal(x.shape[1]), -math.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=0)
        raised = (scores - largest).exp()
        return self.out(join(raised / (raised.sum(-1, keepdim=True) + (-largest).exp()) @ value))


class KeysPadded(Projections):
    """A key and a value of zero in front, and a mask that is padded for them, added to the scores where ``added``."""

    def __init__(self, added: bool, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        key, value = (nn.functional.pad(tensor, (0, 0, 1, 0)) for tensor in (key, value))
        seen = causal(x.shape[1])
        if not self.added:
            return self.out(join(attend(query, key, value, nn.functional.pad(seen, (1, 0), value=True))))
        mask = nn.functional.pad(torch.zeros(seen.shape).masked_fill(~seen, -math.inf), (1, 0))
        return self.out(join((query @ key.mT / math.sqrt(query.shape[-1]) + mask).softmax(-1) @ value))
