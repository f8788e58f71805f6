"""Matrix products: mm, bmm and baddbmm are matmul; a product with a weight is linear."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import (
    Builder,
    arguments,
    dtype,
    is_call,
    is_tensor,
    last_two_swapped,
    rank,
    shape,
    size_equal,
    sizes_equal,
)
from regraft.ir.pattern import add, linear, matmul, permute, reshape
from regraft.ir.pattern import anything as any_argument
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.ir.weights import WeightOp
from regraft.passes.canonicalize import einsum
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


@identity(aten.mm.default, aten.bmm.default)
def product_is_matmul(node: fx.Node, build: Builder) -> fx.Node | None:
    """mm and bmm are matmul of 2-D and 3-D operands."""
    return build.call(aten.matmul.default, *node.args)


@identity(aten.baddbmm.default, aten.addmm.default, exactness=Exactness.REASSOCIATED)
def product_and_sum(node: fx.Node, build: Builder) -> fx.Node | None:
    """beta * input + alpha * (a @ b), written out; an input with beta zero is not read."""
    given = arguments(node)
    left, right = (given["batch1"], given["batch2"]) if "batch1" in given else (given["mat1"], given["mat2"])
    product = build.call(aten.matmul.default, left, right)
    if given["alpha"] != 1:
        product = build.call(aten.mul.Tensor, product, given["alpha"])
    if given["beta"] == 0:
        return product
    addend = given["self"]
    if given["beta"] != 1:
        addend = build.call(aten.mul.Tensor, addend, given["beta"])
    return build.call(aten.add.Tensor, product, addend)


@identity(aten.addcmul.default, aten.addcdiv.default, exactness=Exactness.REASSOCIATED)
def sum_with_product(node: fx.Node, build: Builder) -> fx.Node | None:
    """addcmul(x, a, b) is x + a * b, addcdiv(x, a, b) is x + a / b."""
    given = arguments(node)
    target = aten.mul.Tensor if node.target is aten.addcmul.default else aten.div.Tensor
    term = build.call(target, given["tensor1"], given["tensor2"])
    if given["value"] != 1:
        term = build.call(aten.mul.Tensor, term, given["value"])
    return build.call(aten.add.Tensor, given["self"], term)


def _are_weights(node: Any) -> bool:
    """Whether ``node`` is a softmax over its last dim, of scores of keys."""
    bare = node.args[0] if is_call(node, (aten.to.dtype,)) else node
    return is_call(bare, (aten.softmax.int,)) and bare.args[1] == -1


class TransposedProduct(Rule):
    """(a @ b).T is b.T @ a.T, for products of scores that are computed with keys first."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, left: Any, right: Any) -> Any:
        return permute(matmul(left, right).named("product"), any_argument("order"))

    def check(self, match: Match) -> Iterator[Requirement]:
        size = rank(match.product)
        yield need(list(match.order) == last_two_swapped(size), "other dims than the last two are swapped")
        yield need(min(rank(match.left), rank(match.right)) >= 2 and size >= 3, "an operand has one dim")
        yield need(match.sole_user("product"), "the product is used as it is too", at=match.product)
        yield need(not _are_weights(match.left), "the left operand is a softmax, which stays there")

    def replace(self, match: Match, build: Builder) -> Replacement:
        turned = (
            build.call(aten.permute.default, side, last_two_swapped(rank(side))) for side in (match.right, match.left)
        )
        return build.call(aten.matmul.default, *turned)


@identity(aten.matmul.default, exactness=Exactness.REASSOCIATED)
def weights_first(node: fx.Node, build: Builder) -> fx.Node | None:
    """v.T @ softmax(x).T is (softmax(x) @ v).T: attention whose values have the features first."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    if not is_call(right, (aten.permute.default,)) or rank(right) < 3 or rank(left) != rank(right):
        return None
    weights, order = right.args
    if not _are_weights(weights) or list(order) != last_two_swapped(rank(right)):
        return None
    turned = build.call(aten.permute.default, left, order)
    product = build.call(aten.matmul.default, weights, turned)
    return build.call(aten.permute.default, product, order)


@identity(aten.permute.default)
def transposed_scale(node: fx.Node, build: Builder) -> fx.Node | None:
    """(c * (a @ b)).T is c * (a @ b).T: the scale of scores that are computed with the keys first."""
    scaled, order = node.args
    assert isinstance(scaled, fx.Node)
    if not is_call(scaled, (aten.mul.Tensor, aten.div.Tensor)) or len(scaled.users) > 1:
        return None
    product, number = scaled.args
    if not is_call(product, (aten.matmul.default,)) or not isinstance(number, (int, float)):
        return None
    turned = build.call(aten.permute.default, product, order)
    return build.call(scaled.target, turned, number)  # type: ignore[arg-type]


class MatmulIsLinear(Rule):
    """x @ w.T or x @ w with a weight w is a linear layer; GPT-2's Conv1D weight is transposed as a WeightOp."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, right: Any) -> Any:
        return matmul(x, right)

    def check(self, match: Match) -> Iterator[Requirement]:
        weight, _ = _weight_of(match)
        yield need(weight is not None and rank(weight) == 2, "the right operand is not a 2-D weight", at=match.right)
        yield need(rank(match.x) >= 2 and match.weight_name(match.x) is None, "the left operand is no activation")

    def replace(self, match: Match, build: Builder) -> Replacement:
        weight, transposed = _weight_of(match)
        assert weight is not None
        if not transposed:
            name = match.program.weight_name(weight)
            assert name is not None
            weight = match.program.derive_weight(f"{name}.T", WeightOp("permute", (name,), {"dims": [1, 0]}))
        return build.call(aten.linear.default, match.x, weight)


def _weight_of(match: Match) -> tuple[fx.Node | None, bool]:
    right = match.right
    if match.weight_name(right) is not None:
        return right, False
    if right.target is aten.permute.default and list(right.args[1]) == [1, 0] and match.weight_name(right.args[0]):
        return right.args[0], True
    return None, False


class LinearBias(Rule):
    """linear(x, w) + b with a weight b of the output's width is linear(x, w, b)."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, weight: Any, bias: Any) -> Any:
        return add(linear(x, weight).named("product"), bias)

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(match.weight_name(match.bias) is not None, "what is added is not a weight", at=match.bias)
        yield need(rank(match.bias) == 1 and sizes_equal(shape(match.bias), shape(match.product)[-1:]), "not a bias")
        yield need(dtype(match.bias) == dtype(match.product), "the bias has another element type")
        yield need(match.sole_user("product"), "the product is used without the bias", at=match.product)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return build.call(aten.linear.default, match.x, match.weight, match.bias)


class LinearKeepsShape(Rule):
    """reshape(linear(reshape(x, [-1, k])), [..., n]) is linear(x): leading dims pass through a linear layer. Where the
    first reshape joins heads too, it does that alone."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, weight: Any) -> Any:
        flat = linear(reshape(x, any_argument()), weight, any_argument("bias")).named("product")
        return reshape(flat, any_argument())

    def check(self, match: Match) -> Iterator[Requirement]:
        rows = rank(match.root) - 1
        leading = sizes_equal(shape(match.root)[:-1], shape(match.x)[:rows])
        features = size_equal(shape(match.root)[-1], shape(match.product)[-1])
        yield need(leading and features, "the reshapes do more than flatten the leading dims")
        joined = math.prod(shape(match.x)[rows:])
        yield need(size_equal(joined, shape(match.weight)[-1]), "the features are reshaped too")

    def replace(self, match: Match, build: Builder) -> Replacement:
        x = match.x
        if rank(x) != rank(match.root):
            leading = [build.size(x, dim) for dim in range(rank(match.root) - 1)]
            x = build.call(aten.reshape.default, x, [*leading, shape(match.weight)[-1]])
        bias = [match.bias] if is_tensor(match.bias) else []
        return build.call(aten.linear.default, x, match.weight, *bias)


SPELLINGS = (
    product_is_matmul,
    product_and_sum,
    sum_with_product,
    *einsum.SPELLINGS,
    weights_first,
    TransposedProduct(),
    transposed_scale,
    MatmulIsLinear(),
    LinearBias(),
    LinearKeepsShape(),
)
