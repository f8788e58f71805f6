"""Questions that a module asks of its inputs' values for speed alone, which export cannot answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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
