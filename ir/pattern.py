"""The pattern language: what a rule's ``pattern`` is written in.

A pattern is an expression over variables, built by calling operators, and matched from its root towards its inputs::

    def pattern(self, x, weight, eps):
        scale = rsqrt(add(mean(power(x, 2), [-1], True), scalar("eps")).named("variance"))
        return mul(mul(x, scale), weight)

Commutative operators match either order; ``maybe`` marks an optional wrapper, ``either`` tagged alternatives,
``chain`` any number of wrapping steps in any order. A variable that occurs twice must bind the same node; arguments
that a pattern does not mention must have their schema default. Literals compare by value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns; ``name`` binds the matched node or literal in the match."""

    name: str | None = field(default=None, kw_only=True)

    def named(self, name: str) -> Any:
        """The same pattern, with what it matches bound to ``name``."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Variable(Pattern):
    """Any tensor node (``kind`` "tensor"), number ("scalar") or any argument at all ("anything")."""

    kind: str = "tensor"


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of ``targets``; arguments by position, then by schema name. With ``loose`` arguments that the
    pattern does not mention may be anything."""

    targets: tuple[Any, ...] = ()
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()
    commutative: bool = False
    loose: bool = False


@dataclass(frozen=True)
class Either(Pattern):
    """The first alternative that leads to a whole match; ``tag`` binds the label of the one taken."""

    alternatives: tuple[tuple[str, Any], ...] = ()
    tag: str | None = None


@dataclass(frozen=True)
class Step:
    """One kind of wrapper in a ``Chain``: a label, and the wrapping pattern around a ``Hole``."""

    label: str
    pattern: Pattern


@dataclass(frozen=True)
class Chain(Pattern):
    """``inner`` wrapped by any number of ``steps`` in any order; binds the steps taken, innermost first."""

    inner: Any = None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Hole(Pattern):
    """Stands for what a chain's step wraps; only ``chain`` makes it."""


@dataclass(frozen=True)
class Operator:
    """An operator family that patterns call: ``mul(x, scalar("c"))``."""

    targets: tuple[Any, ...]
    commutative: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        return Call(self.targets, tuple(args), tuple(kwargs.items()), self.commutative)


def variable(name: str) -> Variable:
    """Binds one tensor node."""
    return Variable("tensor", name=name)


def scalar(name: str) -> Variable:
    """Binds a Python number or a symbolic size."""
    return Variable("scalar", name=name)


def anything(name: str | None = None) -> Variable:
    """Binds any argument: a list, None, a number, a node."""
    return Variable("anything", name=name)


def either(*alternatives: Any, tag: str | None = None, **labelled: Any) -> Either:
    """Alternatives, tried in order; keyword alternatives carry their keyword as label."""
    numbered = tuple((str(i), pattern) for i, pattern in enumerate(alternatives))
    return Either(numbered + tuple(labelled.items()), tag)


def maybe(wrap: Callable[[Any], Any], inner: Any, tag: str | None = None) -> Either:
    """``wrap(inner)`` where that matches, else ``inner``."""
    return Either((("wrapped", wrap(inner)), ("bare", inner)), tag)


def chain(inner: Any, name: str, **steps: Callable[[Any], Any]) -> Chain:
    """``inner`` under any number of the labelled steps; ``match[name]`` is the list of steps, innermost first."""
    return Chain(inner, tuple(Step(label, wrap(Hole())) for label, wrap in steps.items()), name=name)


def operator(*targets: Any, commutative: bool = False) -> Operator:
    """An operator family of your own."""
    return Operator(targets, commutative)


# The operators of the canonical graph, by their usual names.
add = Operator((aten.add.Tensor,), commutative=True)
sub = Operator((aten.sub.Tensor,))
mul = Operator((aten.mul.Tensor,), commutative=True)
div = Operator((aten.div.Tensor,))
neg = Operator((aten.neg.default,))
power = Operator((aten.pow.Tensor_Scalar,))
rsqrt = Operator((aten.rsqrt.default,))
sqrt = Operator((aten.sqrt.default,))
reciprocal = Operator((aten.reciprocal.default,))
mean = Operator((aten.mean.dim,))
exp = Operator((aten.exp.default,))
tanh = Operator((aten.tanh.default,))
erf = Operator((aten.erf.default,))
sigmoid = Operator((aten.sigmoid.default,))
silu = Operator((aten.silu.default,))
gelu = Operator((aten.gelu.default,))
relu = Operator((aten.relu.default,))
softmax = Operator((aten.softmax.int,))
matmul = Operator((aten.matmul.default,))
linear = Operator((aten.linear.default,))
layer_norm = Operator((aten.layer_norm.default,))
cat = Operator((aten.cat.default,))
where = Operator((aten.where.self,))
permute = Operator((aten.permute.default,))
reshape = Operator((aten.reshape.default,))
expand = Operator((aten.expand.default,))
unsqueeze = Operator((aten.unsqueeze.default,))
slice_ = Operator((aten.slice.Tensor,))
repeat_interleave = Operator((aten.repeat_interleave.self_int,))
to_dtype = Operator((aten._to_copy.default, aten.to.dtype))
sdpa = Operator((aten.scaled_dot_product_attention.default,))
