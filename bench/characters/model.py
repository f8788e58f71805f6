"""A byte-level decoder trained on prose, and texts that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.decoder import PlainDecoder
from bench.prose import passages

WEIGHTS = Path(__file__).parent / "weights.safetensors"
LENGTH, LAYERS, HIDDEN, HEADS, INNER = 256, 4, 64, 4, 160
_WORDS, _HELD_OUT = 60, 64


def untrained() -> PlainDecoder:
    """The model's shape."""
    return PlainDecoder(LAYERS, HIDDEN, HEADS, HEADS, INNER)


def trained() -> PlainDecoder:
    """The model with its weights, in eval mode."""
    model = untrained()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def texts() -> tuple[Tensor, Tensor]:
    """Bytes ``[passages, LENGTH]`` to train on, and others, of passages that do not overlap."""
    found = [text.encode("ascii", "replace") for text in passages(3000, words=_WORDS)]
    rows = torch.tensor([list(text[:LENGTH]) for text in found if len(text) >= LENGTH])
    return rows[_HELD_OUT:], rows[:_HELD_OUT]
