"""Which tokens are padding: what the mask of an attention says of them, and what is zero where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.mask import And, Keys, Lengths, Not, Or, Predicate, Prefix, parse
from regraft.ir.mask.predicate import renumber, tensors_of
from regraft.ir.nodes import arguments, dtype, is_call, is_tensor, rank, shape, sizes_equal
from regraft.ir.pointwise import is_cast

aten = torch.ops.aten
#: A part of a mask as text, and the tensors that it reads.
Told = tuple[str, tuple[fx.Node, ...]]
_MOVES = (aten.unsqueeze.default, aten.expand.default, aten.permute.default, aten.reshape.default)


def conjuncts(attention: fx.Node) -> tuple[Predicate, ...]:
    """The parts of an attention's mask, all of which must hold where a query sees a key."""
    predicate = parse(arguments(attention)["mask"])
    return predicate.operands if isinstance(predicate, And) else (predicate,)


def padding_of(attention: fx.Node) -> tuple[Predicate, ...]:
    """The parts of an attention's mask by which tensors say of each key by itself whether it is there."""
    return tuple(filter(tensors_of, hidden_keys(attention)))


def hidden_keys(attention: fx.Node) -> tuple[Predicate, ...]:
    """The parts of an attention's mask that say of each key by itself whether it is there."""
    return tuple(filter(is_of_keys, conjuncts(attention)))


def told_of_keys(attention: fx.Node) -> frozenset[Told]:
    """``hidden_keys`` in words that are the same for all attentions which hide the same."""
    tensors, told = arguments(attention)["mask_tensors"], set[Told]()
    for part in hidden_keys(attention):
        numbers = sorted(tensors_of(part))
        words = str(renumber(part, {number: place for place, number in enumerate(numbers)}))
        told.add((words, tuple(tensors[number] for number in numbers)))
    return frozenset(told)


def is_of_keys(predicate: Predicate) -> bool:
    """Whether a part of a mask looks at the key alone."""
    match predicate:
        case Not(operand):
            return is_of_keys(operand)
        case And(operands) | Or(operands):
            return all(map(is_of_keys, operands))
    return isinstance(predicate, Keys | Lengths | Prefix)


@dataclass(frozen=True)
class Padding:
    """``tensor`` is not 0 where a token is there or, ``inverted``, where it is padding."""

    tensor: fx.Node
    inverted: bool = False

    @classmethod
    def of(cls, attention: fx.Node) -> Padding | None:
        """What one tensor says of the keys of an attention; None where none does, or several."""
        match padding_of(attention):
            case (Keys(number) | Not(Keys(number)) as said,):
                tensor, inverted = arguments(attention)["mask_tensors"][number], isinstance(said, Not)
            case _:
                return None
        while (
            is_call(tensor, (aten.unsqueeze.default,)) or _is_against_zero(tensor, aten.ne.Scalar) or _inverts(tensor)
        ):
            inverted ^= _inverts(tensor)
            tensor = tensor.all_input_nodes[0]
        return cls(tensor, inverted)

    def vanishes(self, node: fx.Node) -> bool:
        """Whether ``node`` is zero wherever a token is padding: a product with the mask, a choice by it, or what is
        cast from it."""
        if node is self.tensor:
            return not self.inverted
        if is_call(node, (aten.mul.Tensor,)):
            return any(self.vanishes(factor) and _spans(factor, node) for factor in _tensors(node))
        if is_call(node, (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther)):
            chooses: Any = node.args[0]
            chosen, other = node.args[1:]
            told = _spans(chooses, node)
            first = (told and self.vanishes(chooses)) or self._vanishes_over(chosen, node)
            return first and ((told and self.marks(chooses)) or self._vanishes_over(other, node))
        if is_cast(node) or is_call(node, _MOVES) or _is_against_zero(node, aten.ne.Scalar):
            return self.vanishes(node.all_input_nodes[0])
        return _inverts(node) and self.marks(node.all_input_nodes[0])

    def marks(self, node: fx.Node) -> bool:
        """Whether ``node`` is not zero wherever a token is padding."""
        if node is self.tensor:
            return self.inverted
        if is_call(node, _MOVES) or _is_against_zero(node, aten.ne.Scalar):
            return self.marks(node.all_input_nodes[0])
        if is_cast(node):
            return dtype(node.all_input_nodes[0]) == torch.bool and self.marks(node.all_input_nodes[0])
        return _inverts(node) and self.vanishes(node.all_input_nodes[0])

    def _vanishes_over(self, side: Any, node: fx.Node) -> bool:
        return _is_zero(side) or (isinstance(side, fx.Node) and self.vanishes(side) and _spans(side, node))


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if is_tensor(source)]


def _is_zero(value: Any) -> bool:
    """Whether a number, or all of a tensor, is 0."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float) and value == 0
    if is_call(value, (aten.full.default, aten.full_like.default)):
        return _is_zero(arguments(value)["fill_value"])
    return is_call(value, (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default))


def _is_against_zero(node: fx.Node, comparison: Any) -> bool:
    return is_call(node, (comparison,)) and _is_zero(node.args[1])


def _inverts(node: fx.Node) -> bool:
    """Whether a call is zero where its operand is not, and not zero where that is."""
    if is_call(node, (aten.bitwise_not.default,)):
        return dtype(node) == torch.bool
    return is_call(node, (aten.logical_not.default,)) or _is_against_zero(node, aten.eq.Scalar)


def _spans(operand: Any, product: fx.Node) -> bool:
    """Whether an operand has the batch and the tokens of the result, in front."""
    return rank(operand) == rank(product) and sizes_equal(shape(operand)[:2], shape(product)[:2])
