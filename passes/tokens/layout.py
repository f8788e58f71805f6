"""Where the tokens and the samples of a batch lie among the dims of a tensor.

A layout holds the factors of each dim: ``[batch, heads * head_dim]`` is ``((Batch,), (4, 16))``. Tokens and batch never
come apart: a reshape that would cut them is what a convolution or a window needs, and is refused. Plain sizes may be
cut and multiplied at will.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from regraft.ir.nodes import size_equal


@dataclass(frozen=True)
class Batch:
    """The samples; ``size`` is an int or a symbol."""

    size: Any


@dataclass(frozen=True)
class Span:
    """The tokens from ``start`` to ``stop`` (excluded) of the original sequence."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many tokens there are before any is removed."""
        return self.stop - self.start


Factor = Batch | Span | int | torch.SymInt
Layout = tuple[tuple[Factor, ...], ...]


class Torn(ValueError):
    """A reshape that cuts an axis; ``axis`` is "tokens", "batch" or "sizes"."""

    def __init__(self, axis: str) -> None:
        super().__init__(axis)
        self.axis = axis


def size_of(factor: Factor) -> Any:
    """The size of one factor before any token is removed."""
    return factor.size if isinstance(factor, (Batch, Span)) else factor


def sizes(layout: Layout) -> list[Any]:
    """The shape of a tensor with this layout before any token is removed."""
    return [math.prod(size_of(factor) for factor in factors) for factors in layout]


def plain(sizes: Sequence[Any]) -> Layout:
    """The layout of a tensor that holds neither tokens nor batch."""
    return tuple(() if size_equal(size, 1) else (size,) for size in sizes)


def span_dim(layout: Layout) -> int | None:
    """The dim, from the end, that holds the tokens."""
    return next((dim - len(layout) for dim, factors in enumerate(layout) if span_in(factors) is not None), None)


def span_in(factors: tuple[Factor, ...]) -> Span | None:
    """The tokens among the factors of one dim."""
    return next((factor for factor in factors if isinstance(factor, Span)), None)


def span_of(layout: Layout) -> Span | None:
    """The tokens of a layout."""
    dim = span_dim(layout)
    return None if dim is None else span_in(layout[dim])


def batch_of(layout: Layout) -> Batch | None:
    """The batch of a layout."""
    return next((factor for factors in layout for factor in factors if isinstance(factor, Batch)), None)


def is_plain(factors: tuple[Factor, ...]) -> bool:
    """Whether a dim holds neither tokens nor batch."""
    return not any(isinstance(factor, (Batch, Span)) for factor in factors)


def _is_one_sample(factor: Factor) -> bool:
    return isinstance(factor, Batch) and size_equal(factor.size, 1)


def one_sample(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """The batch of one among the factors of a dim: whatever mixes the others leaves it there."""
    return tuple(factor for factor in factors if _is_one_sample(factor))


def is_mixable(factors: tuple[Factor, ...]) -> bool:
    """Whether what mixes the numbers along a dim mixes neither tokens nor samples."""
    return is_plain(tuple(factor for factor in factors if not _is_one_sample(factor)))


def count_spans(layout: Layout) -> int:
    """How many dims hold tokens; more than one pairs tokens with tokens."""
    return sum(isinstance(factor, Span) for factors in layout for factor in factors)


def settled(layout: Layout) -> Layout | None:
    """The layout, or None where it holds no tokens any more."""
    return layout if span_dim(layout) is not None else None


def merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """The factors of one dim, neighbouring plain sizes multiplied and ones left out (a batch of one stays)."""
    result: list[Factor] = []
    for factor in factors:
        if isinstance(factor, (Batch, Span)):
            result.append(factor)
        elif not size_equal(factor, 1):
            if result and not isinstance(result[-1], (Batch, Span)):
                result[-1] = result[-1] * factor
            else:
                result.append(factor)
    return tuple(result)


def reshaped(layout: Layout, sizes: Sequence[Any]) -> Layout:
    """The layout after a reshape to ``sizes``. Raises ``Torn``."""
    pending = [factor for factors in layout for factor in factors]
    result = [_take(pending, size) for size in sizes]
    if pending and result:
        if any(not size_equal(size_of(factor), 1) for factor in pending):
            raise Torn("sizes")
        result[-1] = (*result[-1], *pending)  # a batch of one behind everything
    return tuple(merged(factors) for factors in result)


def _take(pending: list[Factor], size: Any) -> tuple[Factor, ...]:
    """Factors from the front of ``pending`` whose product is ``size``."""
    taken: list[Factor] = []
    rest = size
    if size_equal(size, 1) and pending and _is_one_sample(pending[0]):
        return (pending.pop(0),)
    while not size_equal(rest, 1):
        if not pending:
            raise Torn("sizes")
        factor = pending.pop(0)
        left = _quotient(rest, size_of(factor))
        if left is not None:
            taken.append(factor)
            rest = left
            continue
        beyond = None if isinstance(factor, (Batch, Span)) else _quotient(factor, rest)
        if beyond is None:
            raise Torn("tokens" if isinstance(factor, Span) else "batch" if isinstance(factor, Batch) else "sizes")
        taken.append(rest)
        pending.insert(0, beyond)
        break
    return tuple(taken)


def _quotient(size: Any, by: Any) -> Any | None:
    """``size / by`` where that is whole, as an int or a symbolic expression; else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    ratio = sympy.cancel(_expression(size) / _expression(by))
    if sympy.fraction(ratio)[1] != 1:
        return None
    return int(ratio) if ratio.is_Integer else _Symbolic(ratio)


@dataclass(frozen=True)
class _Symbolic:
    """What is left of a symbolic size while it is taken apart."""

    expression: Any


def _expression(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return size.expression if isinstance(size, _Symbolic) else sympy.Integer(size)


def permuted(layout: Layout, dims: Sequence[int]) -> Layout:
    """The layout with its dims in the order ``dims``."""
    return tuple(layout[dim] for dim in dims)


def broadcast(layouts: Sequence[Layout], rank: int) -> Layout | None:
    """The layout of an element-wise result from those of its operands; None where tokens or batch meet others."""
    result: list[tuple[Factor, ...]] = []
    for dim in range(-rank, 0):
        found = [layout[dim] for layout in layouts if -dim <= len(layout) and layout[dim]]
        special = [factors for factors in found if not is_plain(factors)]
        if any(factors != special[0] for factors in special):
            return None
        result.append(special[0] if special else found[0] if found else ())
    return tuple(result)


def like(sizes: Sequence[Any], layout: Layout) -> Layout:
    """The layout of a tensor of ``sizes`` that is broadcast against ``layout``: it varies where it is not one."""
    aligned = layout[len(layout) - len(sizes) :] if len(sizes) <= len(layout) else ()
    return tuple(
        () if size_equal(size, 1) else (size,) if is_plain(factors) else factors
        for size, factors in zip(sizes, aligned, strict=True)
    )


def factors_of(layout: Layout) -> Iterator[Factor]:
    """All factors, in order."""
    for factors in layout:
        yield from factors
