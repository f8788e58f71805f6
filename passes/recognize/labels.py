"""Dims by label: what a dim of a product is in the tensors that it was made of, whatever views lie between.

A label names the node and the dim where it came up; a dim of size one has none, for it may come and go. A dim that
several are flattened into has them as its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape, size_equal
from regraft.passes.recognize.moe_experts import float_source

aten = torch.ops.aten

Name = tuple[fx.Node, int]
Atom = tuple[Name, Any]  # a label, and the size of the dim


@dataclass(frozen=True)
class Merged:
    """The label of a dim that several dims are flattened into, first one outermost."""

    atoms: tuple[Atom, ...]


Label = Name | Merged | None


@dataclass(frozen=True)
class Labelled:
    """A tensor and the label of each of its dims."""

    node: fx.Node
    labels: tuple[Label, ...]

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """The labels of the dims that are larger than one, in order and each with its size; merged dims by parts."""
        return tuple(atom for part in zip(self.labels, shape(self.node), strict=True) for atom in _atoms(*part))

    @property
    def present(self) -> tuple[Name, ...]:
        """The labels of the dims that are larger than one, in order."""
        return tuple(name for name, _ in self.atoms)


def labelled(node: fx.Node) -> Labelled:
    """``node`` with labels of its own."""
    return Labelled(node, tuple(None if size_equal(size, 1) else (node, dim) for dim, size in enumerate(shape(node))))


def unviewed(one: Labelled) -> Labelled:
    """What a tensor is a view, a copy or a floating-point cast of, as far as each dim stays whole."""
    while True:
        inner = _inner(one)
        if inner is None:
            return one
        one = inner


def _inner(one: Labelled) -> Labelled | None:
    node, labels = one.node, one.labels
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if not is_tensor(source):
        return None
    if is_call(node, (aten.permute.default,)):
        moved: list[Label] = [None] * len(labels)
        for label, dim in zip(labels, arguments(node)["dims"], strict=True):
            moved[dim] = label
        return Labelled(source, tuple(moved))
    if is_call(node, (aten.expand.default,)):
        return broadcast(source, labels)
    if is_call(node, (aten.reshape.default, aten.unsqueeze.default)):
        return _unshaped(source, one)
    if is_call(node, (aten.repeat.default, aten.repeat_interleave.self_int)):
        return _unrepeated(source, one)
    return Labelled(source, labels) if float_source(node) is source else None


def _atoms(label: Label, size: Any) -> tuple[Atom, ...]:
    if isinstance(label, Merged):
        return label.atoms
    return () if label is None else ((label, size),)


def _joined(atoms: Sequence[Atom]) -> Label:
    return Merged(tuple(atoms)) if len(atoms) > 1 else (atoms[0][0] if atoms else None)


def _unshaped(source: fx.Node, one: Labelled) -> Labelled | None:
    """Behind a reshape: dims of one come and go, and dims are merged; a dim is parted only where it was merged."""
    left = one.atoms
    labels: list[Label] = []
    for size in shape(source):
        count = 0 if size_equal(size, 1) else _count(left, size)
        if count is None:
            return None
        labels.append(_joined(left[:count]))
        left = left[count:]
    return None if left else Labelled(source, tuple(labels))


def _count(atoms: Sequence[Atom], size: Any) -> int | None:
    """How many of the first atoms are a dim of ``size`` together."""
    whole: Any = 1
    for count, (_, extent) in enumerate(atoms, 1):
        whole = whole * extent
        if size_equal(whole, size):
            return count
    return None


def _unrepeated(source: fx.Node, one: Labelled) -> Labelled | None:
    """Behind copies: ``repeat`` makes them the outer part of a dim, ``repeat_interleave`` the inner one."""
    inner = one.node.target is aten.repeat_interleave.self_int
    if rank(source) != len(one.labels):
        return None
    labels: list[Label] = []
    for label, size, extent in zip(one.labels, shape(one.node), shape(source), strict=True):
        atoms = _atoms(label, size)
        if not size_equal(size, extent):
            ordered = atoms if inner else atoms[::-1]
            count = 0 if size_equal(extent, 1) else _count(ordered, extent)
            if count is None:
                return None
            atoms = ordered[:count] if inner else ordered[:count][::-1]
        labels.append(_joined(atoms))
    return Labelled(source, tuple(labels))


def broadcast(operand: fx.Node, labels: tuple[Label, ...]) -> Labelled:
    """An operand of what has ``labels``: dims are aligned at the end, those of one are repeated."""
    sizes = shape(operand)
    own = labels[len(labels) - len(sizes) :]
    return Labelled(operand, tuple(None if size_equal(s, 1) else label for s, label in zip(sizes, own, strict=True)))


def factors(one: Labelled) -> tuple[Labelled, Labelled] | None:
    """The two tensors that are multiplied, dim by dim."""
    left, right = _operands(one.node, aten.mul.Tensor)
    return None if left is None else (broadcast(left, one.labels), broadcast(right, one.labels))


def terms(one: Labelled) -> tuple[Labelled, Labelled] | None:
    """The two tensors that are added, dim by dim."""
    left, right = _operands(one.node, aten.add.Tensor)
    if left is None or arguments(one.node)["alpha"] != 1:
        return None
    return broadcast(left, one.labels), broadcast(right, one.labels)


def _operands(node: fx.Node, target: Any) -> tuple[Any, Any]:
    pair = node.args[:2] if is_call(node, (target,)) else ()
    return (pair[0], pair[1]) if len(pair) == 2 and all(is_tensor(side) for side in pair) else (None, None)


@dataclass(frozen=True)
class Contraction:
    """A product that sums over the dim ``inner``, which is None where it has one entry."""

    left: Labelled
    right: Labelled
    inner: Label


def contraction(one: Labelled) -> Contraction | None:
    """The product that a tensor is: a matrix product, or a sum over one dim of a product; None for any other."""
    one = unviewed(one)
    node, labels = one.node, one.labels
    if is_call(node, (aten.matmul.default,)):
        left, right = node.args[:2]
        if min(rank(left), rank(right)) < 2:  # type: ignore[arg-type]
            return None
        label = _fresh(node, shape(left)[-1])  # type: ignore[arg-type]
        sides = (*labels[:-1], label), (*labels[:-2], label, labels[-1])
        return Contraction(broadcast(left, sides[0]), broadcast(right, sides[1]), label)  # type: ignore[arg-type]
    summed = sum_of(one)
    if summed is None:
        return None
    whole, label = summed
    pair = factors(unviewed(whole))
    return None if pair is None else Contraction(*pair, label)


def sum_of(one: Labelled) -> tuple[Labelled, Label] | None:
    """What a sum over one dim sums, and the label of that dim."""
    node = one.node
    if not is_call(node, (aten.sum.dim_IntList,)):
        return None
    given = arguments(node)
    source, dims = given["self"], given["dim"]
    if not dims or len(dims) != 1:
        return None
    place = dims[0] % rank(source)
    label = _fresh(node, shape(source)[place])
    rest = one.labels[:place] + one.labels[place + 1 :] if given["keepdim"] else one.labels
    return Labelled(source, (*rest[:place], label, *rest[place:])), label


def _fresh(node: fx.Node, size: Any) -> Label:
    return None if size_equal(size, 1) else (node, -1)
