"""Canonical spelling of arithmetic: number operands second, squares as powers, no operation without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, is_tensor, rank, shape, sizes_equal
from regraft.ir.pattern import either, operator, where
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten

_TENSOR_FORM: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.divide.Scalar: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.multiply.Scalar: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
}


@identity(*_TENSOR_FORM)
def tensor_form(node: fx.Node, build: Builder) -> fx.Node | None:
    """The Scalar overloads and the aliases are the Tensor overload."""
    return build.call(_TENSOR_FORM[node.target], *node.args, **node.kwargs)


@identity(aten.mul.Tensor, aten.add.Tensor)
def number_second(node: fx.Node, build: Builder) -> fx.Node | None:
    """A number operand of a commutative operator stands second."""
    left, right = node.args[:2]
    if is_tensor(left) or not is_tensor(right) or node.kwargs:
        return None
    return build.call(node.target, right, left)  # type: ignore[arg-type]


@identity(aten.mul.Tensor)
def square_of_product(node: fx.Node, build: Builder) -> fx.Node | None:
    """x * x is x ** 2; of truth values it would be a number."""
    left, right = node.args
    return build.call(aten.pow.Tensor_Scalar, left, 2) if left is right and dtype(node) != torch.bool else None


@identity(aten.square.default)
def square_is_power(node: fx.Node, build: Builder) -> fx.Node | None:
    """square(x) is x ** 2."""
    return build.call(aten.pow.Tensor_Scalar, node.args[0], 2)


@identity(aten.add.Tensor, aten.sub.Tensor)
def plus_zero(node: fx.Node, build: Builder) -> fx.Node | None:
    """x + 0 is x."""
    return _unit(node, 0)


@identity(aten.mul.Tensor, aten.div.Tensor)
def times_one(node: fx.Node, build: Builder) -> fx.Node | None:
    """x * 1 and x / 1 are x."""
    return _unit(node, 1)


def _unit(node: fx.Node, unit: int) -> fx.Node | None:
    x, other = node.args[:2]
    if isinstance(other, (int, float)) and not isinstance(other, bool) and other == unit and is_tensor(x):
        assert isinstance(x, fx.Node)
        if dtype(x) == dtype(node) and not (x.op == "placeholder" and any(u.op == "output" for u in node.users)):
            return x
    return None


@identity(aten.clamp_min.default, aten.clamp_max.default)
def one_bound_is_clamp(node: fx.Node, build: Builder) -> fx.Node | None:
    """clamp_min(x, c) is clamp(x, c), clamp_max(x, c) is clamp(x, None, c)."""
    x, bound = node.args
    return build.call(aten.clamp.default, x, *((bound,) if node.target is aten.clamp_min.default else (None, bound)))


@identity(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, exactness=Exactness.REASSOCIATED)
def scaled_operand_is_product(node: fx.Node, build: Builder) -> fx.Node | None:
    """add(x, y, alpha=c) is add(x, c * y), so that no rule has to ask what a sum scales; sub and rsub alike."""
    given = arguments(node)
    x, y, scale = given["self"], given["other"], given["alpha"]
    if scale == 1 or not isinstance(scale, (int, float)):
        return None
    scaled = x if node.target is aten.rsub.Tensor else y
    if not is_tensor(scaled) or dtype(scaled) != dtype(node):  # the product would have another type than the sum
        return None
    product = build.call(aten.mul.Tensor, scaled, scale)
    return build.call(node.target, *((product, y) if scaled is x else (x, product)))  # type: ignore[arg-type]


@identity(aten.rsub.Tensor)
def reversed_subtraction(node: fx.Node, build: Builder) -> fx.Node | None:
    """rsub(x, y) of two tensors is y - x."""
    given = arguments(node)
    if given.get("alpha", 1) != 1 or not is_tensor(given["other"]):
        return None
    return build.call(aten.sub.Tensor, given["other"], given["self"])


@identity(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill_is_where(node: fx.Node, build: Builder) -> fx.Node | None:
    """masked_fill(x, mask, number) is where(mask, number, x), when it keeps type and shape."""
    x, mask, number = node.args
    if isinstance(number, fx.Node):
        constant = _constant_number(number)
        if constant is None and sizes_equal(shape(node), shape(x)) and dtype(number) == dtype(node):  # type: ignore[arg-type]
            return build.call(aten.where.self, mask, number, x)
        number = constant
    if not isinstance(number, (int, float)) or not sizes_equal(shape(node), shape(x)):  # type: ignore[arg-type]
        return None
    return build.call(aten.where.ScalarSelf, mask, _of_type(number, dtype(node)), x)


def _of_type(number: float | int, kind: torch.dtype) -> float | int | bool:
    """The number as what a tensor of ``kind`` holds, so that it does not widen the tensor's type."""
    if kind == torch.bool:
        return bool(number)
    return float(number) if kind.is_floating_point else int(number)


def _constant_number(node: fx.Node) -> float | int | None:
    if node.target in (aten.scalar_tensor.default, aten.full.default):
        return node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]  # type: ignore[return-value]
    return None


_REDUCTIONS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.var.correction,
    aten.var.dim,
    aten.softmax.int,
    aten._softmax.default,
    aten.cat.default,
    aten.stack.default,
    aten.concat.default,
    aten.cumsum.default,
    aten.log_softmax.int,
)


@identity(*_REDUCTIONS)
def negative_dim(node: fx.Node, build: Builder) -> fx.Node | None:
    """Reductions, softmax and cat count their dims from the end."""
    given = arguments(node)
    dim = given.get("dim")
    first = given["tensors"][0] if "tensors" in given else given["self"]
    size = rank(node) if node.target is aten.stack.default else rank(first)
    wanted = _from_end(dim, size)
    target: Any = aten.cat.default if node.target is aten.concat.default else node.target
    target = aten.softmax.int if target is aten._softmax.default and not given.get("half_to_float") else target
    if wanted == dim and target is node.target:
        return None
    if target is aten.softmax.int:
        extra = [given["dtype"]] if given.get("dtype") is not None else []
        return build.call(target, first, wanted, *extra)
    if "dim" in node.kwargs:
        return build.call(target, *node.args, **{**node.kwargs, "dim": wanted})
    return build.call(target, node.args[0], wanted, *node.args[2:], **node.kwargs)


def _from_end(dim: Any, size: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_from_end(item, size) for item in dim]
    return dim - size if isinstance(dim, int) and dim >= 0 else dim


class ConstantOperand(Rule):
    """A number that comes as a tensor without dims (full, scalar_tensor, a constant of the model) is a number."""

    exactness = Exactness.BITWISE
    quiet = True

    def pattern(self, left: Any, right: Any) -> Any:
        return either(*(operator(target)(left, right) for target in (*_WITH_NUMBERS, *_BOUNDS)))

    def check(self, match: Match) -> Iterator[Requirement]:
        orders = [(match.left, match.right)]
        if match.root.target in _COMMUTATIVE:
            orders.append((match.right, match.left))
        found = ((x, _constant_value(match, other)) for x, other in orders)
        x, number = next((pair for pair in found if pair[1] is not None), (match.left, None))
        yield need(number is not None, "neither operand is a constant")
        yield need(rank(x) > 0 and dtype(x) == dtype(match.root), "the constant decides the type")
        match.facts["operands"] = x, number

    def replace(self, match: Match, build: Builder) -> Replacement:
        x, number = match.facts["operands"]
        if match.root.target in _BOUNDS:
            bounds = (number,) if match.root.target is aten.maximum.default else (None, number)
            return build.call(aten.clamp.default, x, *bounds)
        return build.call(match.root.target, x, number)  # type: ignore[arg-type]


_WITH_NUMBERS = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
_BOUNDS = (aten.maximum.default, aten.minimum.default)
_COMMUTATIVE = (aten.mul.Tensor, aten.add.Tensor, *_BOUNDS)


_COMPARISONS = {
    aten.eq.Tensor: aten.eq.Scalar,
    aten.ne.Tensor: aten.ne.Scalar,
    aten.lt.Tensor: aten.lt.Scalar,
    aten.le.Tensor: aten.le.Scalar,
    aten.gt.Tensor: aten.gt.Scalar,
    aten.ge.Tensor: aten.ge.Scalar,
}


class ConstantComparison(Rule):
    """A comparison with a number that comes as a tensor without dims is one with the number."""

    exactness = Exactness.BITWISE
    quiet = True

    def pattern(self, left: Any, right: Any) -> Any:
        return operator(*_COMPARISONS)(left, right)

    def check(self, match: Match) -> Iterator[Requirement]:
        number = _constant_item(match, match.right)
        yield need(number is not None and rank(match.left) > 0, "the right side is no constant")
        yield need(torch.promote_types(*map(dtype, (match.left, match.right))) == dtype(match.left), "another type")
        match.facts["number"] = number

    def replace(self, match: Match, build: Builder) -> Replacement:
        target: Any = match.root.target
        number = match.facts["number"]
        return build.call(_COMPARISONS[target], match.left, int(number) if isinstance(number, bool) else number)


class ConstantChoice(Rule):
    """where(condition, x, number) with the number in a tensor without dims, and the same with its sides swapped."""

    exactness = Exactness.BITWISE
    quiet = True

    def pattern(self, condition: Any, left: Any, right: Any) -> Any:
        return where(condition, left, right)

    def check(self, match: Match) -> Iterator[Requirement]:
        sides = _constant_value(match, match.left), _constant_value(match, match.right)
        yield need((sides[0] is None) != (sides[1] is None), "not exactly one side is a constant")
        x = match.right if sides[1] is None else match.left
        yield need(rank(x) > 0 and dtype(x) == dtype(match.root), "the constant decides the type")
        match.facts["sides"] = sides

    def replace(self, match: Match, build: Builder) -> Replacement:
        first, second = match.facts["sides"]
        if second is None:
            return build.call(aten.where.ScalarSelf, match.condition, first, match.right)
        return build.call(aten.where.ScalarOther, match.condition, match.left, second)


def _constant_value(match: Match, node: fx.Node) -> float | int | None:
    value = _constant_item(match, node)
    return None if isinstance(value, bool) else value


def _constant_item(match: Match, node: fx.Node) -> float | int | bool | None:
    """The number or truth value that a tensor without dims holds, None where it is no constant."""
    if rank(node) != 0:
        return None
    name = match.weight_name(node)
    if name is not None:
        mutable = {*match.program.parameters(), *match.program.mutated().values()}
        return None if name in mutable else _plain(match.program.weights.get(name).item())
    number = _constant_number(node)
    if not isinstance(number, (int, float)):
        return None
    return _plain(torch.tensor(number, dtype=dtype(node)).item())  # as rounded to the tensor's own type


def _plain(number: Any) -> float | int | bool | None:
    return number if isinstance(number, (int, float)) else None


SPELLINGS = (
    tensor_form,
    ConstantOperand(),
    ConstantComparison(),
    ConstantChoice(),
    number_second,
    square_of_product,
    square_is_power,
    plus_zero,
    times_one,
    one_bound_is_clamp,
    scaled_operand_is_product,
    reversed_subtraction,
    masked_fill_is_where,
    negative_dim,
)
