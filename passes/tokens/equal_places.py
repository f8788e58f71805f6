"""Which places along a dim of a tensor hold the same numbers, whatever the inputs are: proved from the graph.

A token that is expanded or repeated, padding, one tensor put twice into a row of others, rows of a constant that are
equal: all of these are equal where they arise, and stay equal through whatever treats each place alike. An operator
that has no rule tells all places apart, so that what is said to be equal is equal for every input. Equal means the same
formula on the same numbers: a product may round equal rows differently where they lie in different tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir import ops
from regraft.ir.nodes import FILLED_LIKE, arguments, is_random, is_tensor, rank, shape, size_equal
from regraft.ir.pointwise import is_pointwise
from regraft.ir.probe import Pool, Probe, ProbeError
from regraft.ir.program import Program

aten = torch.ops.aten
#: For each place, the first one that holds the same; None where no two places are known to be equal.
Labels = tuple[int, ...] | None
_Rule = Callable[["EqualPlaces", fx.Node, int], Labels]
_RULES: dict[Any, _Rule] = {}
#: Constants up to this size are compared by their numbers.
_LARGEST_BYTES = 64 << 20


@dataclass
class EqualPlaces:
    """What is known about the values of one program. Nodes that a rewrite adds are understood when they are asked for;
    ``survey`` goes through all of them in order, so that no question reaches far back."""

    program: Program
    _known: dict[tuple[fx.Node, int], Labels] = field(default_factory=dict)
    _fixed: dict[fx.Node, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mutated = set(self.program.mutated().values())
        self.survey()

    def survey(self) -> None:
        """Find out about all activations; constants are compared when they meet some that repeat."""
        for node in self.program.graph.nodes:
            if is_tensor(node) and not self._is_fixed(node):
                for dim in range(-rank(node), 0):
                    self.of(node, dim)

    def of(self, node: fx.Node, dim: int) -> Labels:
        """The labels of the places along ``dim``, which counts from the end."""
        key = node, dim
        if key not in self._known:
            self._known[key] = self._find(node, dim)
        return self._known[key]

    def keys(self, node: fx.Node, dim: int) -> Sequence[int]:
        """The labels along ``dim``, each place its own where none are equal."""
        return self.of(node, dim) or range(shape(node)[dim])

    def common(self, operands: Iterable[tuple[fx.Node, int]], size: int) -> Labels:
        """Places that are equal in all ``operands``, each along its dim of ``size`` places."""
        together: list[Sequence[int]] = [(0,) * size]
        for node, dim in sorted(operands, key=lambda operand: self._is_fixed(operand[0])):
            labels = self.of(node, dim)
            if labels is None:
                return None
            together.append(labels)
        return first_places(zip(*together, strict=True))

    def _find(self, node: fx.Node, dim: int) -> Labels:
        size = shape(node)[dim]
        if not isinstance(size, int) or size < 2:
            return None
        value = self._constant(node)
        if value is not None:
            return first_places(_contents(value, dim))
        rule = _RULES.get(node.target) or (_pointwise if is_pointwise(node) else None)
        return rule(self, node, dim) if rule is not None else None

    def _constant(self, node: fx.Node) -> Tensor | None:
        """What a node holds in every call; None where that is not known, or too large to be looked through."""
        if not self._is_fixed(node) or not 0 < _bytes(node) <= _LARGEST_BYTES:
            return None
        try:
            value: Tensor = Probe(self.program, (), Pool(), self.program.example).evaluate([node])[0]
        except ProbeError:
            return None
        return value

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether a tensor is made of weights alone, in a shape that no input decides, and is the same in each call."""
        if node not in self._fixed:
            self._fixed[node] = self._depends_on_nothing(node)
        return self._fixed[node]

    def _depends_on_nothing(self, node: fx.Node) -> bool:
        if not is_tensor(node) or not all(isinstance(size, int) for size in shape(node)):
            return False
        if node.op == "placeholder":
            name = self.program.weight_name(node)
            return name is not None and name not in self._mutated
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return False
        return not is_random(node) and all(map(self._is_fixed, node.all_input_nodes))


def first_places(keys: Iterable[Hashable]) -> Labels:
    """The labels of places that are equal where their ``keys`` are."""
    first: dict[Hashable, int] = {}
    labels = tuple(first.setdefault(key, place) for place, key in enumerate(keys))
    return labels if len(first) < len(labels) else None


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _contents(value: Tensor, dim: int) -> list[bytes]:
    """The bits of what lies at each place along ``dim``."""
    places = value.detach().cpu().movedim(dim, 0)
    rows = places.reshape(places.shape[0], -1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return [row.numpy().tobytes() for row in rows]


def _rule(*targets: Any) -> Callable[[_Rule], _Rule]:
    def enter(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return enter


def _spreads(source: fx.Node, dim: int) -> bool:
    """Whether a broadcast operand is the same at all places along ``dim``."""
    return rank(source) < -dim or size_equal(shape(source)[dim], 1)


def _all_equal(node: fx.Node, dim: int) -> Labels:
    size: int = shape(node)[dim]
    return (0,) * size


def _pointwise(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """Places are equal where those of all operands are."""
    operands = [source for source in node.all_input_nodes if is_tensor(source) and not _spreads(source, dim)]
    return equal.common([(source, dim) for source in operands], shape(node)[dim])


@_rule(*FILLED_LIKE, aten.full.default, aten.zeros.default, aten.ones.default)
def _filled(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    return _all_equal(node, dim)


@_rule(aten.expand.default)
def _expand(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    source = arguments(node)["self"]
    return _all_equal(node, dim) if _spreads(source, dim) else equal.of(source, dim)


@_rule(aten.repeat.default)
def _repeat(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """One copy behind another."""
    source = arguments(node)["self"]
    if _spreads(source, dim):
        return _all_equal(node, dim)
    once = shape(source)[dim]
    if not isinstance(once, int) or not once:
        return None
    return first_places([*equal.keys(source, dim)] * (shape(node)[dim] // once))


@_rule(aten.repeat_interleave.self_int)
def _repeat_interleave(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """The copies of each place beside it."""
    source, along = arguments(node)["self"], arguments(node)["dim"]
    if along is None:
        return None
    if along % rank(node) != dim % rank(node):
        return equal.of(source, dim)
    once = shape(source)[dim]
    if not isinstance(once, int) or not once:
        return None
    times = shape(node)[dim] // once
    return first_places(label for label in equal.keys(source, dim) for _ in range(times))


@_rule(aten.cat.default)
def _cat(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """A part that comes twice holds the same both times."""
    parts: list[fx.Node] = arguments(node)["tensors"]
    if any(rank(part) != rank(node) for part in parts):
        return None
    if arguments(node)["dim"] % rank(node) != dim % rank(node):
        return equal.common([(part, dim) for part in parts], shape(node)[dim])
    if not all(isinstance(shape(part)[dim], int) for part in parts):
        return None
    return first_places((part, label) for part in parts for label in equal.keys(part, dim))


@_rule(aten.stack.default)
def _stack(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """As in ``_cat``, each part at one place of a new dim."""
    parts: list[fx.Node] = arguments(node)["tensors"]
    new, place = arguments(node)["dim"] % rank(node), dim % rank(node)
    if place == new:
        return first_places(parts)
    inner = place - (place > new) - rank(node) + 1
    return equal.common([(part, inner) for part in parts], shape(node)[dim])


@_rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """What is padded with one number is equal; the rest as it was."""
    given = arguments(node)
    source, pads = given["self"], [*given["pad"], *[0] * (2 * rank(node))]
    before, behind = pads[-2 * dim - 2 : -2 * dim]
    if given.get("mode", "constant") != "constant" or not isinstance(shape(source)[dim], int):
        return None
    if not all(isinstance(count, int) and count >= 0 for count in (before, behind)):
        return None
    return first_places([-1] * before + [*equal.keys(source, dim)] + [-1] * behind)


@_rule(aten.slice.Tensor)
def _slice(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    given = arguments(node)
    labels, bounds = equal.of(given["self"], dim), slice(given["start"], given["end"], given["step"])
    if labels is None or given["dim"] % rank(node) != dim % rank(node):
        return labels
    known = all(bound is None or isinstance(bound, int) for bound in (bounds.start, bounds.stop, bounds.step))
    return first_places(labels[bounds]) if known else None


@_rule(aten.select.int)
def _select(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    source, gone = arguments(node)["self"], arguments(node)["dim"]
    place = dim % rank(node)
    return equal.of(source, place + (place >= gone % rank(source)) - rank(source))


@_rule(aten.unsqueeze.default)
def _unsqueeze(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    source, place = arguments(node)["self"], dim % rank(node)
    return equal.of(source, place - (place > arguments(node)["dim"] % rank(node)) - rank(source))


@_rule(aten.permute.default)
def _permute(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    source = arguments(node)["self"]
    return equal.of(source, arguments(node)["dims"][dim] % rank(source) - rank(source))


@_rule(aten.reshape.default)
def _reshape(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """Dims that stay whole, or become one."""
    source = arguments(node)["self"]
    behind = shape(node)[dim:][1:]
    if not all(isinstance(size, int) for size in behind):
        return None
    count = math.prod(behind)
    end, begin = (_cut(shape(source), number) for number in (count, count * shape(node)[dim]))
    if begin is None or end is None:
        return None
    return first_places(itertools.product(*(equal.keys(source, d - rank(source)) for d in range(begin, end))))


def _cut(sizes: Sequence[Any], count: int) -> int | None:
    """The dim behind which, it included, there are ``count`` numbers."""
    place, product = len(sizes), 1
    while product != count:
        place -= 1
        if place < 0 or not isinstance(sizes[place], int):
            return None
        product *= sizes[place]
    return place


@_rule(aten.linear.default, aten.matmul.default)
def _product(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """A product with one matrix, over features."""
    source, matrix = list(arguments(node).values())[:2]
    if dim == -1 or rank(matrix) != 2 or rank(source) != rank(node):
        return None
    return equal.of(source, dim)


@_rule(aten.layer_norm.default, aten.rms_norm.default, ops.rms_norm)
def _norm(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    dims = len(arguments(node).get("normalized_shape", (0,)))
    return None if -dim <= dims else equal.of(node.all_input_nodes[0], dim)


@_rule(aten.embedding.default)
def _embedding(equal: EqualPlaces, node: fx.Node, dim: int) -> Labels:
    """Equal indices are looked up alike."""
    return None if dim == -1 else equal.of(arguments(node)["indices"], dim + 1)
