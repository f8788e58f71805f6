"""Masked variants of attention, each as regraft's operator, for SDPA, for FlexAttention, and written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.mask import parse, to_dense

HEADS, SIZE = 4, 64
SCALE = 1 / math.sqrt(SIZE)
WINDOW, SINKS, CAP, DOCUMENTS = 512, 4, 20.0, 8

#: ``(batch, head, query, key) -> visible`` of index tensors, as FlexAttention calls it.
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One variant. ``mask`` is the predicate's text for a length; ``visible`` makes the same of indices; ``sdpa`` is
    "flag" where SDPA needs no mask tensor, "mask" where it takes one, "" where it cannot compute the variant."""

    name: str
    mask: Callable[[int], str]
    visible: Callable[[int], Visible]
    sdpa: str = "mask"
    per_head: bool = False
    documents: bool = False
    slopes: bool = False
    softcap: float = 0.0
    weight: str = "softmax"


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def _documents(length: int) -> Visible:
    size = length // DOCUMENTS
    return lambda b, h, q, k: q // size == k // size


VARIANTS = (
    Variant("no mask", lambda n: "all", lambda n: lambda b, h, q, k: k >= 0, "flag"),
    Variant("causal", lambda n: "band(None,0)", lambda n: _causal, "flag"),
    Variant(
        f"window {WINDOW}",
        lambda n: f"band({1 - WINDOW},0)",
        lambda n: lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
    ),
    Variant(
        f"{SINKS} sinks + window {WINDOW}",
        lambda n: f"band(None,0) & (prefix({SINKS}) | band({1 - WINDOW},None))",
        lambda n: lambda b, h, q, k: (k <= q) & ((k < SINKS) | (q - k < WINDOW)),
    ),
    Variant(
        f"long-short, half local, {WINDOW}",
        lambda n: f"band(None,0) & (heads({HEADS // 2},{HEADS}) | band({1 - WINDOW},None))",
        lambda n: lambda b, h, q, k: (k <= q) & ((h >= HEADS // 2) | (q - k < WINDOW)),
        per_head=True,
    ),
    Variant(f"{DOCUMENTS} documents", lambda n: "same(0,0)", _documents, documents=True),
    Variant(
        "prefix of a quarter",
        lambda n: f"band(None,0) | prefix({n // 4})",
        lambda n: lambda b, h, q, k: (k <= q) | (k < n // 4),
    ),
    Variant("ALiBi, causal", lambda n: "band(None,0)", lambda n: _causal, slopes=True),
    Variant("softcap, causal", lambda n: "band(None,0)", lambda n: _causal, "", softcap=CAP),
    Variant("sigmoid, causal", lambda n: "band(None,0)", lambda n: _causal, "", weight="sigmoid"),
)


def operands(length: int) -> list[Tensor]:
    """Query, key and value ``[1, HEADS, length, SIZE]``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, SIZE, generator=generator) for _ in range(3)]


def slopes() -> Tensor:
    """ALiBi's slopes for HEADS heads (Press et al., ICLR 2022)."""
    return 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)


class Site(nn.Module):
    """A variant as regraft's operator."""

    def __init__(self, variant: Variant, length: int) -> None:
        super().__init__()
        self.variant, self.mask = variant, variant.mask(length)
        self.register_buffer("slopes", slopes() if variant.slopes else None)
        ids = torch.arange(length)[None] // (length // DOCUMENTS) if variant.documents else None
        self.register_buffer("documents", ids)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        tensors = [] if self.documents is None else [self.documents]
        if self.variant.weight != "softmax":
            options: dict[str, Any] = {"weight": self.variant.weight, "mask": self.mask}
            return ops.attention_mapped(query, key, value, tensors, None, None, scale=SCALE, **options)
        return ops.attention(
            query, key, value, tensors, None, self.slopes, None, scale=SCALE, mask=self.mask,
            softcap=self.variant.softcap,
        )  # fmt: skip


def dense(variant: Variant, length: int) -> Tensor:
    """The mask as a boolean tensor ``[1, 1 or HEADS, length, length]``."""
    site = Site(variant, length)
    tensors = [] if site.documents is None else [site.documents]
    return to_dense(parse(site.mask), tensors, 1, HEADS if variant.per_head else 1, length, length)


def additive(variant: Variant, length: int) -> Tensor:
    """What SDPA adds to the scores: minus infinity where the mask hides, ALiBi besides."""
    seen = dense(variant, length)
    if not variant.slopes:
        return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
    place = torch.arange(length)
    bias = slopes()[None, :, None, None] * (place - place[:, None])
    return bias.masked_fill_(~seen, -math.inf)


def written_out(variant: Variant, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, rows: slice) -> Tensor:
    """Some rows of the variant by its formula, in the operands' element type; ``seen`` is the mask of these rows."""
    scores = query[:, :, rows] @ key.mT * SCALE
    if variant.softcap:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    if variant.slopes:
        distance = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[rows, None]
        scores = scores + slopes().to(scores.dtype)[None, :, None, None] * distance
    if variant.weight == "sigmoid":
        return torch.sigmoid(scores) * seen @ value
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def score_mod(variant: Variant) -> Callable[..., Tensor] | None:
    """What FlexAttention does to a score."""
    if variant.softcap:
        return lambda score, b, h, q, k: variant.softcap * torch.tanh(score / variant.softcap)
    if variant.slopes:
        table = slopes()
        return lambda score, b, h, q, k: score + table[h] * (k - q)
    return None
