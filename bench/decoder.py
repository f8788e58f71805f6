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


class DecodeStep(nn.Module):
    """The next token of a decoder, ``[batch, 1]``, behind caches ``[layers, batch, kv_heads, before, size]``; returns
    its logits ``[batch, 1, vocabulary]``."""

    def __init__(self, model: PlainDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Logits of the token."""
        x = self.model.embedding(tokens)
        cos, sin = (table[-1:].to(x.dtype) for table in self.model._tables(keys.shape[3] + 1, tokens.device))
        for number, block in enumerate(self.model.blocks):
            x = block.step(x, cos, sin, keys[number], values[number])
        return self.model.head(self.model.norm(x))  # type: ignore[no-any-return]


def caches(model: PlainDecoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a step behind ``tokens`` reads: rotated keys, and values, of all layers."""
    x = model.embedding(tokens)
    cos, sin = (table.to(x.dtype) for table in model._tables(tokens.shape[1], tokens.device))
    held = []
    for block in model.blocks:
        held.append(block.held(x, cos, sin))
        x = block(x, cos, sin)
    keys, values = (torch.stack(parts) for parts in zip(*held, strict=True))
    return keys, values


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
        return self._rest(x + self._attend(self.before_attention(x), cos, sin))

    def _rest(self, x: Tensor) -> Tensor:
        y = self.before_gate(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]

    def held(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, length, size]`` of what enters the block."""
        x = self.before_attention(x)
        return _rotated(self._split(self.key(x)), cos, sin), self._split(self.value(x))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One token behind cached keys and values."""
        key, value = self.held(x, cos, sin)
        query = _rotated(self._split(self.query(self.before_attention(x))), cos, sin)
        every = (torch.cat(pair, 2).repeat_interleave(self.groups, 1) for pair in ((keys, key), (values, value)))
        mixed = nn.functional.scaled_dot_product_attention(query, *every)
        return self._rest(x + self.out(mixed.transpose(1, 2).flatten(2)))

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
