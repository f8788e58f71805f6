"""Matrix products: mm, bmm, baddbmm and einsum are matmul; a product with a weight is linear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.ir.pattern import Call, add, linear, matmul, reshape
from regraft.ir.pattern import anything as any_argument
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.ir.weights import WeightOp
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


class EinsumIsMatmul(Rule):
    """A two-operand einsum is permute, matmul, permute; indices of one operand only become broadcast batch dims."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self) -> Any:
        return Call((aten.einsum.default,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        operands = match.root.args[1]
        yield need(isinstance(operands, (list, tuple)) and len(operands) == 2, "einsum does not have two operands")
        yield need(_Einsum.parse(match.root) is not None, "einsum repeats an index, sums one alone or has an ellipsis")

    def replace(self, match: Match, build: Builder) -> Replacement:
        plan = _Einsum.parse(match.root)
        assert plan is not None
        operands: Any = match.root.args[1]
        left, right = operands
        product = build.call(
            aten.matmul.default,
            _arranged(build, left, plan.left, [*plan.batch, plan.rows, plan.inner]),
            _arranged(build, right, plan.right, [*plan.batch, plan.inner, plan.columns]),
        )
        have = [*plan.batch, plan.rows, plan.columns]
        return build.call(aten.permute.default, product, [have.index(label) for label in plan.out])


class _Einsum:
    """``out = left, right`` with one contracted index, and one index of each operand as matmul's rows and columns."""

    def __init__(self, left: str, right: str, out: str) -> None:
        self.left, self.right, self.out = left, right, out
        self.inner = next(label for label in left if label in right and label not in out)
        self.rows = [label for label in out if label in left and label not in right][-1]
        self.columns = [label for label in out if label in right and label not in left][-1]
        self.batch = [label for label in out if label not in (self.rows, self.columns)]

    @staticmethod
    def parse(node: fx.Node) -> _Einsum | None:
        equation = str(node.args[0]).replace(" ", "")
        if equation.count("->") != 1 or "." in equation or equation.count(",") != 1:
            return None
        (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
        shared = [label for label in left if label in right and label not in out]
        alone = [label for label in left + right if label not in out and label not in shared]
        repeated = any(len(set(labels)) != len(labels) for labels in (left, right, out))
        rows = [label for label in out if label in left and label not in right]
        columns = [label for label in out if label in right and label not in left]
        if repeated or alone or len(shared) != 1 or not rows or not columns:
            return None
        return _Einsum(left, right, out)


def _arranged(build: Builder, operand: fx.Node, labels: str, wanted: list[str]) -> fx.Node:
    present = [label for label in wanted if label in labels]
    arranged = build.call(aten.permute.default, operand, [labels.index(label) for label in present])
    for place, label in enumerate(wanted):
        if label not in labels:
            arranged = build.call(aten.unsqueeze.default, arranged, place - (rank(arranged) + 1))
    return arranged


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
    """reshape(linear(reshape(x, [-1, k])), [..., n]) is linear(x): leading dims pass through a linear layer."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any, weight: Any) -> Any:
        flat = linear(reshape(x, any_argument()), weight, any_argument("bias")).named("product")
        return reshape(flat, any_argument())

    def check(self, match: Match) -> Iterator[Requirement]:
        leading = sizes_equal(shape(match.root)[:-1], shape(match.x)[:-1])
        features = size_equal(shape(match.root)[-1], shape(match.product)[-1])
        yield need(leading and features, "the reshapes do more than flatten the leading dims")
        yield need(size_equal(shape(match.x)[-1], shape(match.weight)[-1]), "the features are reshaped too")

    def replace(self, match: Match, build: Builder) -> Replacement:
        bias = [match.bias] if is_tensor(match.bias) else []
        return build.call(aten.linear.default, match.x, match.weight, *bias)


SPELLINGS = (product_is_matmul, product_and_sum, EinsumIsMatmul(), MatmulIsLinear(), LinearBias(), LinearKeepsShape())
