"""Questions that a model asks while it is captured, where export's own answer leads nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules import transformer


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """``torch.nn.TransformerEncoder`` and ``TransformerDecoder`` do not compare their mask with a causal one inside.

    They do so to pass a flag beside the mask, which no value depends on: the mask is used either way, and what it
    means is read from the graph.
    """
    real = transformer._detect_is_causal_mask

    def hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    transformer._detect_is_causal_mask = hint
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = real


@contextlib.contextmanager
def as_if_not_compiled() -> Iterator[None]:
    """``torch.compiler.is_compiling`` and ``is_exporting`` say no, as they do when the model runs by itself.

    Models ask them to leave out what a compiler might not take; some leave out a default that they need.
    """
    compiler = torch.compiler
    before = compiler._is_compiling_flag, compiler._is_exporting_flag
    compiler._is_compiling_flag = compiler._is_exporting_flag = False
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before
