"""Encoders and a layer of routed experts without any library behind them, for machines that have PyTorch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Self-attention with biases; ``groups`` query heads share a key head."""

    def __init__(self, width: int, heads: int, kv_heads: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.head_dim, self.causal, self.grouped = width // heads, causal, kv_heads not in (None, heads)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, (kv_heads or heads) * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x [batch, tokens, width]``; ``mask``, where given, is true for what is seen."""
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal, enable_gqa=self.grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """A layer of an encoder, the norm in front (ViT) or behind (BERT)."""

    def __init__(self, width: int, heads: int, inner: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = PlainAttention(width, heads)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.first(x), mask)
            return x + self.down(F.gelu(self.up(self.second(x))))  # type: ignore[no-any-return]
        x = self.first(x + self.attention(x, mask))
        return self.second(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class PlainVit(nn.Module):
    """A vision transformer: logits of images ``[batch, 3, size, size]``."""

    def __init__(self, layers: int, width: int, heads: int, size: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 50)
        self.places = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) / 50)
        self.blocks = nn.ModuleList(_Block(width, heads, 4 * width, norm_first=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[batch, 1000]`` from the first token."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class PlainBert(nn.Module):
    """An encoder of texts, padded behind: states of ids ``[batch, tokens]`` with a mask that is true for tokens."""

    def __init__(self, layers: int, width: int, heads: int, length: int = 512, vocabulary: int = 30522) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Block(width, heads, 4 * width, norm_first=False) for _ in range(layers))

    def forward(self, ids: Tensor, there: Tensor) -> Tensor:
        """States ``[batch, tokens, width]``."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.places(places))
        mask = there[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return x


def grouped_experts(x: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
    """Routed experts by PyTorch's grouped product: pairs sorted by expert, a product a projection, sums by token.

    ``x [tokens, hidden]``, ``index`` and ``weight`` ``[tokens, top_k]``, ``first [experts, 2 * inner, hidden]``, ``down
    [experts, hidden, inner]``, in bf16.
    """
    experts, top_k = first.shape[0], index.shape[1]
    ids, order = torch.sort(index.reshape(-1))
    counts = torch.histc(ids.float(), bins=experts, min=0, max=experts - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], first.transpose(-2, -1), offs=offsets).chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offsets)
    out = (out * weight.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
    return out.view(index.shape[0], top_k, x.shape[1]).sum(1)


class PlainExpertLayer(nn.Module):
    """A decoder layer whose feed-forward part is routed experts: ``x [batch, tokens, width]``."""

    def __init__(self, width: int, heads: int, kv_heads: int, experts: int, inner: int, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.attention = PlainAttention(width, heads, kv_heads, causal=True)
        self.before_attention, self.before_experts = nn.RMSNorm(width), nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.first = nn.Parameter(torch.randn(experts, 2 * inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, inner) * inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """One layer with both residuals."""
        x = x + self.attention(self.before_attention(x))
        rows = self.before_experts(x).flatten(0, 1)
        weight, index = torch.topk(self.router(rows).float().softmax(-1), self.top_k)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        return x + grouped_experts(rows, index, weight, self.first, self.down).view_as(x)
