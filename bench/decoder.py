"""A plain decoder without any library behind it: RMSNorm, rotary embedding, grouped-query attention, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainDecoder(nn.Module):
    """``layers`` pre-norm blocks on token ids ``[batch, length]``; returns logits ``[batch, length, vocabulary]``.

    ``inner`` is the width between the gated projections, four times ``hidden`` when it is None.
    """

    def __init__(
        self, layers: int, hidden: int = 64, heads: int = 4, kv_heads: int = 2, inner: int | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, heads, kv_heads, inner or 4 * hidden) for _ in range(layers))
        self.norm = _RmsNorm(hidden)
        self.head = nn.Linear(hidden, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position."""
        x = self.embedding(tokens)
        cos, sin = (table.to(x.dtype) for table in self._tables(tokens.shape[1], tokens.device))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        size = self.blocks[0].head_size
        rates = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
        angles = torch.arange(length, device=device)[:, None] * rates
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()


class _RmsNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.head_size, self.groups = hidden // heads, heads // kv_heads
        self.before_attention, self.before_gate = _RmsNorm(hidden), _RmsNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, kv_heads * self.head_size, bias=False)
        self.value = nn.Linear(hidden, kv_heads * self.head_size, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self._attend(self.before_attention(x), cos, sin)
        y = self.before_gate(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query = _rotated(self._split(self.query(x)), cos, sin)
        key = _rotated(self._split(self.key(x)), cos, sin).repeat_interleave(self.groups, 1)
        value = self._split(self.value(x)).repeat_interleave(self.groups, 1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
