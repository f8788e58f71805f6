"""Weights of a program: the tensors it was captured with, and the ones rewrites derive from them.

A rewrite never computes a new weight on the spot. It describes it by a ``WeightOp`` (data, never a closure), so that
the artifact can store the original tensors once and replay the operations, and so that only one derived weight is
in memory at a time while a model is lowered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


class WeightError(ValueError):
    """A weight was asked for that the store does not hold, or an operation on weights is malformed."""


def _concat(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim)


def _permute(tensors: list[Tensor], dims: list[int]) -> Tensor:
    return tensors[0].permute(dims).contiguous()


def _reshape(tensors: list[Tensor], shape: list[int]) -> Tensor:
    return tensors[0].reshape(shape)


def _cast(tensors: list[Tensor], dtype: str) -> Tensor:
    return tensors[0].to(getattr(torch, dtype))


def _slice(tensors: list[Tensor], dim: int, start: int, end: int) -> Tensor:
    return tensors[0].narrow(dim, start, end - start).contiguous()


def _index(tensors: list[Tensor], dim: int, indices: list[int]) -> Tensor:
    return tensors[0].index_select(dim, torch.tensor(indices, dtype=torch.int64, device=tensors[0].device))


def _zeros_like_rows(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0].new_zeros(tensors[0].shape[dim])


def _norm_scale(statistics: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as ``x * scale + shift``, in fp64."""
    weight, bias, mean, variance = (tensor.double() for tensor in statistics)
    scale = weight / torch.sqrt(variance + eps)
    return scale, bias - mean * scale


def _normed_weight(tensors: list[Tensor], eps: float, before: bool, groups: int) -> Tensor:
    """The weight of a convolution ``[out, in / groups, …]`` with a batch norm ``before`` it or behind folded in."""
    weight = tensors[0]
    scale, _ = _norm_scale(tensors[1:5], eps)
    tail = [1] * (weight.dim() - 2)
    if not before:
        return (weight.double() * scale.reshape(-1, 1, *tail)).to(weight.dtype)
    grouped = weight.double().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, *tail)).reshape(weight.shape).to(weight.dtype)


def _normed_bias(tensors: list[Tensor], eps: float, before: bool, groups: int) -> Tensor:
    """The bias that belongs to ``normed_weight``."""
    weight = tensors[0]
    scale, shift = _norm_scale(tensors[1:5], eps)
    bias = tensors[5].double() if len(tensors) > 5 else scale.new_zeros(weight.shape[0])
    if not before:
        return (bias * scale + shift).to(weight.dtype)
    grouped = weight.double().flatten(2).sum(-1).reshape(groups, weight.shape[0] // groups, -1)
    return (bias + (grouped * shift.reshape(groups, 1, -1)).sum(-1).reshape(-1)).to(weight.dtype)


def _with_centre(tensors: list[Tensor]) -> Tensor:
    """A depthwise kernel with one more at its centre: the convolution and what it reads, in one."""
    kernel = tensors[0].clone()
    centre: list[slice | int] = [slice(None), slice(None), *(size // 2 for size in kernel.shape[2:])]
    kernel[tuple(centre)] += 1
    return kernel


#: Every operation a weight may go through: name -> function of (tensors, **options).
WEIGHT_OPS: dict[str, Callable[..., Tensor]] = {
    "concat": _concat,
    "permute": _permute,
    "reshape": _reshape,
    "cast": _cast,
    "slice": _slice,
    "index": _index,
    "zero_bias": _zeros_like_rows,
    "normed_weight": _normed_weight,
    "normed_bias": _normed_bias,
    "with_centre": _with_centre,
}


@dataclass(frozen=True)
class WeightOp:
    """One operation on named weights, as data: ``WeightOp("concat", ("q.weight", "k.weight"), {"dim": 0})``."""

    op: str
    inputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.op not in WEIGHT_OPS:
            raise WeightError(f"unknown weight operation {self.op!r}; known: {', '.join(sorted(WEIGHT_OPS))}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``weight_ops.json``."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> WeightOp:
        """Inverse of :meth:`to_json`; raises ``WeightError`` for an operation that is not known."""
        return WeightOp(str(data["op"]), tuple(data["inputs"]), dict(data.get("options", {})))


class WeightStore:
    """Named tensors of a program.

    ``originals`` are the model's own tensors, shared with it, never copied; two names may hold the very same tensor
    (tied weights stay tied). ``derived`` maps a new name to the operation that makes it. ``get`` computes a derived
    weight each time it is asked: whoever needs it for long keeps it.
    """

    def __init__(self, originals: dict[str, Tensor] | None = None) -> None:
        self.originals: dict[str, Tensor] = dict(originals or {})
        self.derived: dict[str, WeightOp] = {}
        self._by_operation: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.originals or name in self.derived

    def get(self, name: str, convert: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
        """The tensor called ``name``; raises ``WeightError`` when there is none.

        ``convert`` is applied to each original first: with a conversion to fake tensors a derived weight's shape is
        found without computing it.
        """
        if name in self.originals:
            return convert(self.originals[name])
        if name in self.derived:
            op = self.derived[name]
            return WEIGHT_OPS[op.op]([self.get(part, convert) for part in op.inputs], **op.options)
        raise WeightError(f"the program has no weight named {name!r}")

    def derive(self, hint: str, op: WeightOp) -> str:
        """Register a derived weight under a fresh name built from ``hint`` and return that name."""
        key = json.dumps(op.to_json(), sort_keys=True)
        known = self._by_operation.get(key)
        if known in self.derived:
            return known
        name = self._by_operation[key] = self._fresh(hint)
        self.derived[name] = op
        return name

    def add_constant(self, hint: str, value: Tensor) -> str:
        """Store a tensor that a rewrite computed once (a folded table or mask)."""
        name = self._fresh(hint)
        self.originals[name] = value
        return name

    def discard(self, name: str) -> None:
        """Forget a derived weight or a constant that a rolled back rewrite had added."""
        self.derived.pop(name, None)
        self.originals.pop(name, None)

    def sources(self, name: str) -> Iterator[str]:
        """Names of the original tensors that ``name`` is made of."""
        if name in self.derived:
            for part in self.derived[name].inputs:
                yield from self.sources(part)
        else:
            yield name

    def keep_only(self, names: set[str]) -> None:
        """Drop every weight that none of ``names`` needs."""
        needed: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                pending += self.derived[name].inputs if name in self.derived else ()
        self.derived = {name: op for name, op in self.derived.items() if name in needed}
        self.originals = {name: tensor for name, tensor in self.originals.items() if name in needed}

    def nbytes(self) -> int:
        """Bytes held by distinct original tensors (tied ones count once)."""
        distinct = {id(tensor): tensor for tensor in self.originals.values()}
        return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in distinct.values())

    def copy(self) -> WeightStore:
        """A store that shares the tensors and has its own names."""
        twin = WeightStore(self.originals)
        twin.derived = dict(self.derived)
        return twin

    def _fresh(self, hint: str) -> str:
        name, count = hint, 0
        while name in self:
            count += 1
            name = f"{hint}_{count}"
        return name
