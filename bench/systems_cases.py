"""The systems of ``docs/systems.md`` at a size that takes a tenth of a second or so on two cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.zoo import (
    core_context,
    heads,
    long_short,
    lumos,
    maformer,
    masks,
    parts,
    reversed_attention,
    sigmoid,
    tokenformer,
    trees,
    uniformer,
)

WIDTH, HEADS, LENGTH = 512, 8, 1024
SIZE = WIDTH // HEADS
#: Files whose models attend by a function of ``parts``, which a peer may replace.
_ATTENDING: tuple[ModuleType, ...] = (
    core_context,
    heads,
    long_short,
    lumos,
    maformer,
    masks,
    sigmoid,
    trees,
    uniformer,
)
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A system and its inputs. ``softmax``: whether its attention is one that SDPA can compute."""

    make: Callable[[], nn.Module]
    args: Callable[[], tuple[Tensor, ...]]
    softmax: bool = True


@contextmanager
def attending(function: Attend) -> Iterator[None]:
    """Models of the zoo attend by ``function(query, key, value, seen)`` meanwhile."""
    replaced = [patch.object(module, "attend", function) for module in _ATTENDING if hasattr(module, "attend")]
    for item in replaced:
        item.start()
    try:
        yield
    finally:
        for item in replaced:
            item.stop()


def draw(*sizes: int, seed: int = 1) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _tokens() -> tuple[Tensor, ...]:
    return (draw(1, LENGTH, WIDTH),)


def _set() -> tuple[Tensor, ...]:
    member, place = masks.members((256, 256, 256), 128, 128)
    return (*_tokens(), member, place)


def _drafts(count: int) -> tuple[Tensor, ...]:
    return (draw(1, count, WIDTH), *trees.cache(1, 4096, HEADS, SIZE))


def _tree(count: int) -> tuple[int, ...]:
    """A balanced binary tree of drafts."""
    return (-1, *((node - 1) // 2 for node in range(1, count)))


def _utterances() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return (*_tokens(), torch.randint(0, 3, (1, LENGTH), generator=generator))


def _shape() -> dict[str, int]:
    return {"width": WIDTH, "heads": HEADS}


CASES: dict[str, Case] = {
    "long-short, one mask": Case(lambda: long_short.LongShortByMask(WIDTH, HEADS, 128), _tokens),
    "long-short, two calls": Case(lambda: long_short.LongShortByHeads(WIDTH, HEADS, 128), _tokens),
    "core context": Case(lambda: core_context.CoreContextAttention(WIDTH, HEADS, 16, 128), _tokens),
    "sigmoid": Case(lambda: sigmoid.SigmoidAttention(**_shape()), _tokens, softmax=False),
    "sigmoid, normalised": Case(lambda: sigmoid.SigmoidAttention(True, **_shape()), _tokens, softmax=False),
    "elu + 1": Case(lambda: sigmoid.EluAttention(**_shape()), _tokens, softmax=False),
    "key and value bias": Case(lambda: sigmoid.KeyBias(True, **_shape()), _tokens),
    "learned sink": Case(lambda: sigmoid.LearnedSink(**_shape()), _tokens, softmax=False),
    "reversed": Case(lambda: reversed_attention.ReversedAttention(**_shape()), _tokens, softmax=False),
    "MAFormer": Case(lambda: maformer.Maformer(256, 8, 32, 8), lambda: (draw(2, 32 * 32, 256),)),
    "UniFormer": Case(lambda: uniformer.Uniformer(128, 4), lambda: (draw(2, 128, 28, 28),)),
    "TokenFormer": Case(lambda: tokenformer.TokenFormer(False, WIDTH, 2048), _tokens, softmax=False),
    "TokenFormer, normed first": Case(lambda: tokenformer.TokenFormer(True, WIDTH, 2048), _tokens, softmax=False),
    "Lumos-1": Case(lambda: lumos.Lumos(SIZE, HEADS, 64, 8, 12), _tokens),
    "PPD": Case(lambda: trees.TreeVerification(_tree(32), **_shape()), lambda: _drafts(32)),
    "Falcon": Case(lambda: trees.TreeVerification(trees.FALCON, **_shape()), lambda: _drafts(len(trees.FALCON))),
    "set-based prompting": Case(lambda: masks.SetBasedPrompting(**_shape()), _set),
    "switching (BICO)": Case(lambda: masks.Switching(**_shape()), lambda: (*_tokens(), torch.tensor([0]))),
    "identities (EmotionIC)": Case(lambda: masks.Identity(**_shape()), _utterances),
    "word blocks": Case(
        lambda: masks.WordBlocks(**_shape()), lambda: (*_tokens(), (torch.arange(LENGTH) // 8).expand(1, -1))
    ),
    "multi-token heads (GOAT-TTS)": Case(lambda: heads.MultiToken(**_shape(), classes=4096), _tokens),
    "auxiliary heads (CAFT)": Case(lambda: heads.Auxiliary(**_shape(), classes=4096), _tokens),
}


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention with the mask as a tensor."""
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)


attend_written_out = parts.attend
