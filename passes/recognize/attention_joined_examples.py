"""Attentions on slices of the heads, joined again, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.rule import Example

_WINDOW, _CAUSAL = "band(-2,0)", "band(None,0)"


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: str, **options: Any) -> Tensor:
    tensors, bias = options.pop("tensors", []), options.pop("bias", None)
    out: Tensor = ops.attention(query, key, value, tensors, bias, mask=mask, **{"scale": 0.5, **options})
    return out


def _joined(
    bounds: tuple[int, int] = (2, 2), groups: int = 1, dim: int = 1, first: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Heads up to the first bound see a window, those from the second on all keys before."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        end, start = bounds
        key, value = (tensor[:, : query.shape[1] // groups] for tensor in (key, value))
        few, others = slice(0, end // groups), slice(start // groups, None)
        near = _attend(query[:, :end], key[:, few], value[:, few], _WINDOW, **(first or {}))
        far = _attend(query[:, start:], key[:, others], value[:, others], _CAUSAL)
        return torch.cat([near, far], dim)

    return function


def _same_masks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = (slice(0, 1), slice(1, 4), slice(4, 6))
    return torch.cat([_attend(query[:, p], key[:, p], value[:, p], "all") for p in parts], 1)


def _paddings(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A mask tensor each."""
    first, second = query[:, 0, :, 0] > -1.0, query[:, 0, :, 1] > -1.0
    near = _attend(query[:, :2], key[:, :2], value[:, :2], "keys(0) | band(0,0)", tensors=[first])
    far = _attend(query[:, 2:], key[:, 2:], value[:, 2:], "band(None,0) & keys(0) | band(0,0)", tensors=[second])
    return torch.cat([near, far], 1)


def _read_elsewhere(query: Tensor, key: Tensor, value: Tensor) -> Any:
    near = _attend(query[:, :2], key[:, :2], value[:, :2], _WINDOW)
    far = _attend(query[:, 2:], key[:, 2:], value[:, 2:], _CAUSAL)
    return torch.cat([near, far], 1), near.sum()


def _example(name: str, function: Callable[..., Any], reason: str = "") -> Example:
    def make() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        return function, tuple(torch.randn(2, 6, 9, 4, generator=generator) for _ in range(3))

    return Example(name, make, reason)


JOINED = (
    _example("a window and all keys before", _joined()),
    _example("grouped queries", _joined(groups=2)),
    _example("three slices of one attention", _same_masks),
    _example("mask tensors of their own", _paddings),
)

JOINED_NEAR_MISSES = (
    _example("other scales", _joined(first={"scale": 0.25}), "differ in more than their masks"),
    _example("heads left out", lambda q, k, v: _joined((2, 3))(q, k, v), "not slices of one tensor"),
    _example("heads in another order", lambda q, k, v: torch.cat(
        [_attend(q[:, 2:], k[:, 2:], v[:, 2:], _CAUSAL), _attend(q[:, :2], k[:, :2], v[:, :2], _WINDOW)], 1
    ), "not slices of one tensor"),
    _example("a bias", _joined(first={"bias": torch.ones(1, 2, 9, 9)}), "bias, slopes or sinks"),
    _example("heads read elsewhere", _read_elsewhere, "read elsewhere"),
)  # fmt: skip
